#include "bind/bind.h"

namespace bitnet {

void bind_rowwise(py::module_&) {}

}  // namespace bitnet
