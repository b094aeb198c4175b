// Algorithms and proofs, for `pycomm verify` and for algorithms written in Python.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings/array.h"
#include "bindings/python.h"
#include "common/error.h"
#include "runtime/select.h"
#include "schedule/algorithms.h"
#include "schedule/lower/layout.h"
#include "schedule/lower/lower.h"
#include "schedule/verify/verify.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using namespace schedule;

// What an algorithm in Python writes a rank's program with. It may keep this beyond the call.
struct PyBuilder {
  std::shared_ptr<Schedule> schedule;
  std::shared_ptr<Builder> builder;
};

Schedule call_python(const py::function& write, const World& world) {
  const Locked locked;
  const auto written = std::make_shared<Schedule>();
  written->ranks.resize(world.size);
  for (int rank = 0; rank < world.size; ++rank) {
    write(PyBuilder{written, std::make_shared<Builder>(*written, rank)}, world);
  }
  return *written;
}

std::optional<std::string> verify_call(const std::string& algorithm, const std::string& collective, int size,
                                       int64_t count, const py::object& dtype, const std::string& op,
                                       int root, const std::string& placement, bool in_place,
                                       const py::object& write) {
  if (size < 1) throw ValueError("`size` is " + std::to_string(size) + ": a group has at least one rank");
  if (count < 0) throw ValueError("`count` is " + std::to_string(count) + ": pass 0 or more");
  if (placement != "plain" && placement != "symmetric") {
    throw ValueError("`placement` is \"" + placement + "\": pass plain or symmetric");
  }
  Call call;
  call.world = {.collective = parse_collective(collective), .size = size, .root = root};
  if (call.world.traits().between_two()) call.world.size = 2, call.world.peer = 1 - root;
  if (root < 0 || root >= call.world.size)
    throw ValueError("`root` is " + std::to_string(root) + ": pass a rank from 0 to " +
                     std::to_string(call.world.size - 1));
  call.dtype = dtype_from_python(dtype.ptr());
  call.op = parse_op(op);
  if (call.world.traits().reduces) {
    require(call.dtype, call.op);
  } else {
    call.op = any_op(call.dtype);
  }
  call.counts = uniform_counts(call.world, count);
  call.in = call.out = placement == "plain" ? Placement::plain : Placement::symmetric;
  call.in_place = in_place;
  const runtime::Geometry geometry = runtime::host_geometry(size, runtime::built_in_profile(caches()));
  const Schedule written = write.is_none()
                               ? find_algorithm(call.world.collective, algorithm).write(call.world)
                               : call_python(write, call.world);
  const Unlocked unlocked;
  const Plan plan = lower(written, algorithm, call, geometry);
  const auto wrong = verify(plan);
  return wrong ? std::optional(wrong->what) : std::nullopt;
}

}  // namespace

void add_schedules(py::module_& module) {
  py::class_<Chunk>(module, "Chunk", "Elements [len * first / of, len * last / of) of a block.")
      .def(py::init([](int block, int first, int last, int of) { return Chunk{block, first, last, of}; }),
           py::arg("block") = 0, py::arg("first") = 0, py::arg("last") = 1, py::arg("of") = 1);
  py::class_<Ref>(module, "Ref", "A chunk of a named buffer of a rank.")
      .def_readonly("rank", &Ref::rank)
      .def("__repr__", [](const Ref& ref) {
        return std::string(name(ref.buffer)) + "@" + std::to_string(ref.rank) + " block " +
               std::to_string(ref.chunk.block) + " [" + std::to_string(ref.chunk.first) + ", " +
               std::to_string(ref.chunk.last) + ")/" + std::to_string(ref.chunk.of);
      });
  py::class_<World>(module, "World", "The collective and the ranks that an algorithm writes a schedule for.")
      .def_property_readonly("collective",
                             [](const World& world) { return std::string(name(world.collective)); })
      .def_readonly("size", &World::size)
      .def_readonly("root", &World::root)
      .def_readonly("nodes", &World::nodes,
                    "The node of each rank: two ranks of one node share memory, others send messages. Empty: "
                    "one node.");
  py::class_<PyBuilder> builder(module, "Builder", "Writes one rank's program: see docs/algorithms.md.");
  builder.def_property_readonly("rank", [](const PyBuilder& b) { return b.builder->rank(); })
      .def(
          "stage",
          [](PyBuilder& b, int stage) {
            if (stage < 0 || stage > 3)
              throw ValueError("`stage` is " + std::to_string(stage) + ": pass 0, 1, 2 or 3");
            b.builder->stage(stage);
          },
          py::arg("stage"),
          "Sets the stage of the steps that follow: in iteration i they work on trip i - stage.")
      .def(
          "combine",
          [](PyBuilder& b, std::vector<Ref> dsts, std::vector<Ref> srcs, bool final) {
            b.builder->combine(std::move(dsts), std::move(srcs), final);
          },
          py::arg("dsts"), py::arg("srcs"), py::arg("final") = false,
          "dst = srcs[0] op srcs[1] ... for every dst; with one source, a copy.")
      .def(
          "copy", [](PyBuilder& b, Ref dst, Ref src) { b.builder->copy(dst, src); }, py::arg("dst"),
          py::arg("src"))
      .def(
          "offer", [](PyBuilder& b, int peer, Ref ref) { b.builder->offer(peer, ref); }, py::arg("peer"),
          py::arg("ref"), "From now until the accept, the peer may read or write this chunk.")
      .def(
          "accept", [](PyBuilder& b, int peer, Ref ref) { b.builder->accept(peer, ref); }, py::arg("peer"),
          py::arg("ref"), "Waits until the peer has finished with this chunk.");
  const auto buffer_method = [&](const char* method, schedule::Buffer buffer) {
    builder.def(
        method,
        [buffer](const PyBuilder& b, const Chunk& chunk, std::optional<int> rank) {
          return Ref{rank ? *rank : b.builder->rank(), buffer, chunk};
        },
        py::arg_v("chunk", Chunk{}, "Chunk()"), py::arg("rank") = py::none(),
        "A chunk of this rank's buffer of that name, or of another rank's.");
  };
  buffer_method("in_", schedule::Buffer::in);
  buffer_method("out", schedule::Buffer::out);
  buffer_method("image", schedule::Buffer::image);
  buffer_method("scratch", schedule::Buffer::scratch);

  module.def(
      "algorithms",
      [](const std::string& collective) { return algorithm_names(parse_collective(collective)); },
      py::arg("collective"), "The names of this collective's algorithms.");
  module.def("verify", &verify_call, py::arg("algorithm"), py::arg("collective"), py::arg("size"),
             py::arg("count"), py::kw_only(), py::arg("dtype") = "float32", py::arg("op") = "sum",
             py::arg("root") = 0, py::arg("placement") = "plain", py::arg("in_place") = false,
             py::arg("write") = py::none(),
             "Proves the plan of this call on all ranks. Returns the first counterexample in words, or None. "
             "`write`: a function (builder, world) that writes the program, in place of a known algorithm.");
  module.def(
      "add_algorithm",
      [](PyCommunicator& comm, const std::string& collective, const std::string& name,
         const py::function& write) {
        // Dropped under the interpreter's lock, whichever thread drops the communicator.
        auto held = std::shared_ptr<py::function>(new py::function(write), [](py::function* f) {
          drop_locked([](void* function) { delete static_cast<py::function*>(function); }, f);
        });
        comm.handle->memo.clear();  // first: dropping the old function may run Python, which may call
        comm->add_algorithm(parse_collective(collective), name,
                            [held](const World& world) { return call_python(*held, world); });
      },
      py::arg("comm"), py::arg("collective"), py::arg("name"), py::arg("write"),
      "Makes `algorithm=name` known to this communicator.");
}

}  // namespace pycomm::bindings
