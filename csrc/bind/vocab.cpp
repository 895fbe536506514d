#include "bind/bind.h"

namespace bitnet {

void bind_vocab(py::module_&) {}

}  // namespace bitnet
