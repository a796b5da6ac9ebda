// What the taps of a strip read, packed as [column][lanes] for the sparse kernels, whatever the layout of the source.
#pragma once

#include "line_packer.h"
#include "pixel_packer.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Calls body with the packer for the source, which keeps what it finds in the slot.
template <typename T, typename Body>
MASKED_OPS_INLINE void with_packer(const Cut& cut, const TapBlocks& blocks, const Strip& strip,
                                   const Memory<const T>& source, Slot slot, const Body& body) {
  const PackedChannel packed(strip.phase(), blocks, cut, strip.vectors());
  if (source.channels_last) {
    body(PixelPacker<T>(strip, packed, source, scratch(slot, PixelPacker<T>::bytes(strip, packed))));
  } else {
    body(LinePacker<T>(strip, packed, source, scratch(slot, LinePacker<T>::bytes(strip, packed))));
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
