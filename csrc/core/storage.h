// The types that elements may have in memory.
#pragma once

namespace dynloss {

enum class Storage { float32, float64, float16, bfloat16 };

}  // namespace dynloss
