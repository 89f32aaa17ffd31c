// Makes one graph node of a chain of ops. The node runs the ops' own kernels,
// in their order, so its results have the bits of the chain; what it saves is
// the cost of a node for each of them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "mlx/mlx.h"

namespace glm_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;
using Chain = std::function<Arrays(const Arrays&)>;

// What tells one chain from another of the same name: all that it captures.
using Key = std::vector<int64_t>;

// Returns what `chain` makes of `inputs`, as the outputs of one node named
// `name`. The chain may use this package's ops, and views of arrays; its ops
// have to be on stream `s`, of a CPU, and not of the reference. It is called
// once for each key and inputs of the same shapes and types, and what it did is
// kept. Throws std::runtime_error for a chain with other ops.
Arrays block(
    const std::string& name,
    const Key& key,
    const Chain& chain,
    const Arrays& inputs,
    mx::StreamOrDevice s);

}  // namespace glm_fused
