// Channels of images moved together, and apart again.
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

template <typename Element>
struct Selection {
  int64_t outer, in_channels, out_channels, inner;
  const int64_t* slots;
  const Element* in;
  const Element* fill;  // may be null
  Element* out;

  // A channel of an image in one piece.
  void plane(int64_t image, int64_t c) const {
    Element* const to = out + (image * out_channels + c) * inner;
    if (slots[c] >= 0) {
      std::memcpy(to, in + (image * in_channels + slots[c]) * inner, static_cast<size_t>(inner) * sizeof(Element));
    } else {
      const Element value = fill ? fill[c] : Element{};
      for (int64_t i = 0; i < inner; ++i) to[i] = value;
    }
  }

  // All channels of a position, where they lie side by side. Which are filled is no branch: nothing could predict it.
  void position(int64_t o) const {
    const Element* const from = in + o * in_channels;
    Element* const to = out + o * out_channels;
    for (int64_t c = 0; c < out_channels; ++c) {
      const Element moved = from[max<int64_t>(slots[c], 0)], value = fill ? fill[c] : Element{};
      to[c] = slots[c] < 0 ? value : moved;
    }
  }

  void run(const Team& team) const {
    if (inner == 1 && in_channels > 0) {
      const int64_t grain = max<int64_t>(tuning::kPassGrain / max<int64_t>(out_channels, 1), 1);
      team.for_each(ceil_div(outer, grain), [&](int64_t task) {
        for (int64_t o = task * grain; o < min(outer, (task + 1) * grain); ++o) position(o);
      });
      return;
    }
    const int64_t planes = outer * out_channels, grain = max<int64_t>(tuning::kPassGrain / max<int64_t>(inner, 1), 1);
    team.for_each(ceil_div(planes, grain), [&](int64_t task) {
      for (int64_t p = task * grain; p < min(planes, (task + 1) * grain); ++p)
        plane(p / out_channels, p % out_channels);
    });
  }
};

template <typename Element>
void select(const Team& team, int64_t outer, int64_t in_channels, int64_t out_channels, int64_t inner,
            const int64_t* slots, const void* in, const void* fill, void* out) {
  Selection<Element>{outer,
                     in_channels,
                     out_channels,
                     inner,
                     slots,
                     static_cast<const Element*>(in),
                     static_cast<const Element*>(fill),
                     static_cast<Element*>(out)}
      .run(team);
}

}  // namespace

void select_channels(const Team& team, size_t element_size, int64_t outer, int64_t in_channels, int64_t out_channels,
                     int64_t inner, const int64_t* slots, const void* in, const void* fill, void* out) {
  with_word(element_size, [&](auto element) {
    select<decltype(element)>(team, outer, in_channels, out_channels, inner, slots, in, fill, out);
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
