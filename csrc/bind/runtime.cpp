// ISA, threads, counted memory and metrics.
#include <pybind11/stl.h>

#include <memory>

#include "base/arena.h"
#include "base/os.h"
#include "base/threads.h"
#include "bind/bind.h"

namespace bitnet {
namespace {

std::vector<std::string> isa_names(const std::vector<Isa>& isas) {
  std::vector<std::string> names;
  for (const Isa isa : isas) names.emplace_back(isa_name(isa));
  return names;
}

py::dict memory_dict() {
  const MemoryStats stats = memory_stats();
  py::dict d;
  d["current"] = stats.current;
  d["peak"] = stats.peak;
  d["limit"] = stats.limit;
  return d;
}

py::list metrics_list() {
  py::list rows;
  for (const auto& [key, count] : metrics_snapshot()) {
    const auto& [op, isa, mode] = key;
    rows.append(
        py::make_tuple(op, isa, mode, count.calls, count.bytes, count.nanoseconds, count.threads));
  }
  return rows;
}

void set_mode(const std::string& mode) {
  metrics_mode(mode == "full" ? "full" : mode == "incremental" ? "incremental" : "op");
}

}  // namespace

void bind_runtime(py::module_& m) {
  m.def("available_isas", [] { return isa_names(available_isas()); });
  m.def("get_isa", [] { return std::string(isa_name(kernels().isa)); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("isa_description", [](const std::string& name) {
    for (int i = 0; i < kIsaCount; ++i)
      if (name == isa_name(Isa(i))) return std::string(isa_description(Isa(i)));
    throw std::runtime_error("unknown ISA '" + name + "'");
  });
  m.def("kernel_tables", [] {
    const Kernels& k = kernels();
    py::dict d;
    d["ternary"] = k.ternary->isa;
    d["rowwise"] = k.rowwise->isa;
    d["vocab"] = k.vocab->isa;
    d["attention"] = k.attention->isa;
    d["mask"] = k.mask->isa;
    d["screen"] = k.screen->isa;
    d["attention_int8"] = k.attention_int8->isa;
    return d;
  });
  m.def("cpu_brand", &cpu_brand);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("threads"));
  m.def("usable_cpus", &os_usable_cpus);
  m.def("cpu_quota", &os_cpu_quota, py::arg("root") = "");

  m.def("memory_stats", &memory_dict);
  m.def("reset_peak_memory", &reset_peak_memory);
  m.def("set_memory_limit", &set_memory_limit, py::arg("bytes"));
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_property_readonly("nbytes", &Buffer::bytes)
      .def_buffer([](Buffer& b) {
        return py::buffer_info(static_cast<uint8_t*>(b.data()), py::ssize_t(b.bytes()));
      });

  m.def("metrics_listen", &metrics_listen, py::arg("change"));
  m.def("metrics_snapshot", &metrics_list);
  m.def("set_mode", &set_mode, py::arg("mode"));
}

}  // namespace bitnet
