#include "bind/bind.h"

namespace bitnet {

void bind_attention(py::module_&) {}

}  // namespace bitnet
