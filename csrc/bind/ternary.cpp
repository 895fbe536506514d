#include "bind/bind.h"

namespace bitnet {

void bind_ternary(py::module_&) {}

}  // namespace bitnet
