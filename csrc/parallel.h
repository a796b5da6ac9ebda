// Torch's threads for the kernels.
#pragma once

#include "cpu/api.h"

namespace masked_ops {

// The team for a piece of work of about `operations` arithmetic or memory operations: one thread where starting others
// would cost more than they save, and inside somebody else's parallel region.
cpu::Team team_for(int64_t operations);
// The same for the product of M rows with so many weights, after `further` operations.
cpu::Team team_for_product(int64_t M, int64_t weights, int64_t further = 0);

}  // namespace masked_ops
