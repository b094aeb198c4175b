#include "bindings/lists.h"

#include <algorithm>
#include <cstdio>
#include <span>
#include <string>
#include <utility>

#include "bindings/codecs.h"
#include "bindings/coding.h"
#include "bindings/packing.h"
#include "common/error.h"
#include "common/hash.h"
#include "kernels/codec.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using kernels::Segment;

// From this size on, copying an item of a list there and back takes longer than a call of its own.
constexpr int64_t kLongCopyBytes = 128 << 10;

struct Item {
  std::span<const int64_t> shape;
  DType dtype;
};

// A list in words, for ranks to compare: the shapes of its items, with the type of each that has another
// one than the first. If they are too long for a message, a hash of all stands for the last ones.
std::string signature_of(const std::vector<Item>& list) {
  constexpr size_t kLongest = 180;
  Hasher all;
  std::string text;
  bool whole = true;
  for (const Item& item : list) {
    std::string shape = shape_text(item.shape);
    if (item.dtype != list[0].dtype) shape = name(item.dtype) + shape;
    all.add(shape);
    whole = whole && text.size() + shape.size() <= kLongest;
    if (whole) text += (text.empty() ? "" : " ") + shape;
  }
  text = "list of " + std::to_string(list.size()) + ": " + text;
  if (whole) return text;
  char number[24];
  std::snprintf(number, sizeof number, " ... #%08x", static_cast<unsigned>(all.digest()));
  return text + number;
}

// The buffers of a list that go in one call.
struct Group {
  enum class Kind : uint8_t { packed, alone, coded, exempt };
  Kind kind;
  std::vector<size_t> items;
  std::vector<Array> ins, outs;  // outs: empty if this rank receives nothing
  bool in_place() const { return outs.empty() || outs[0].data == ins[0].data; }
};

// A list, read and checked.
class List {
 public:
  List(const Method& method, const PyCommunicator& comm, const Arguments& args);

  bool only_sends() const { return only_sends_; }
  size_t size() const { return ins_.size(); }
  const Array& in(size_t i) const { return ins_[i]; }
  PyObject* item(size_t i) const { return PyTuple_GET_ITEM(items_.ptr(), static_cast<Py_ssize_t>(i)); }
  std::string signature() const;
  // Keeps the buffers alive and, for an asynchronous call, their memory in its place.
  std::shared_ptr<void> keep(bool async) const;
  py::object result() const { return out_list_; }
  // Throws ValueError if two outputs overlap.
  void require_apart() const;
  // The calls to make. `kinds` has the kind of each item.
  std::vector<Group> group(const std::vector<Group::Kind>& kinds) const;

 private:
  void take(size_t i, const std::string& item);

  // Tuples: the caller may change the lists while the call is under way.
  py::tuple items_, out_items_;
  py::object out_list_;
  std::string out_name_;
  bool only_sends_ = false;
  std::vector<Array> ins_, outs_;
};

List::List(const Method& method, const PyCommunicator& comm, const Arguments& args)
    : items_(py::reinterpret_borrow<py::object>(args[Arg::x])),
      out_list_(py::reinterpret_borrow<py::object>(args[args[Arg::out] ? Arg::out : Arg::x])),
      out_name_(args[Arg::out] ? "out" : "x") {
  if (args[Arg::out] && !PyList_Check(args[Arg::out]) && !PyTuple_Check(args[Arg::out])) {
    throw TypeError(std::string("`out` is a ") + Py_TYPE(args[Arg::out])->tp_name +
                    ": pass a list as long as `x`");
  }
  out_items_ = py::tuple(out_list_);
  if (items_.size() != out_items_.size()) {
    throw ValueError("`out` has " + std::to_string(out_items_.size()) + " buffers for " +
                     std::to_string(items_.size()) + " in `x`: pass one for each");
  }
  const bool from_root = schedule::traits(method.collective).in.on == schedule::Content::On::root;
  only_sends_ = from_root && comm->rank() == root_argument(comm, args) && !args[Arg::out];
  for (size_t i = 0; i < items_.size(); ++i) {
    try {
      take(i, "");
    } catch (const std::exception&) {  // again, to name the item: names for all would take time
      take(i, "[" + std::to_string(i) + "]");
      throw;
    }
  }
}

void List::take(size_t i, const std::string& item) {
  Array in = get_array(items_[i].ptr(), ("x" + item).c_str()),
        out = get_array(out_items_[i].ptr(), (out_name_ + item).c_str());
  if (!only_sends_) require_writable(out, (out_name_ + item).c_str());
  require_alike(in, out, item);
  ins_.push_back(std::move(in));
  outs_.push_back(std::move(out));
}

void List::require_apart() const {
  std::vector<Extent> extents;
  for (size_t i = 0; i < outs_.size(); ++i) extents.push_back(extent_of(outs_[i], i));
  if (const auto found = find_overlap(std::move(extents))) {
    throw ValueError("`" + out_name_ + "[" + std::to_string(found->first) + "]` and `" + out_name_ + "[" +
                     std::to_string(found->second) + "]` overlap: pass buffers with memory of their own");
  }
}

std::string List::signature() const {
  std::vector<Item> list;
  for (const Array& in : ins_) list.push_back({in.shape, in.dtype});
  return signature_of(list);
}

std::shared_ptr<void> List::keep(bool async) const {
  std::vector<std::shared_ptr<void>> held = {keep_alive(py::make_tuple(items_, out_items_))};
  if (async) {  // buffers are copied when the call runs
    for (const py::handle item : items_) held.push_back(hold_memory(item.ptr()));
    for (const py::handle item : out_items_) held.push_back(hold_memory(item.ptr()));
  }
  return std::make_shared<std::vector<std::shared_ptr<void>>>(std::move(held));
}

std::vector<Group> List::group(const std::vector<Group::Kind>& kinds) const {
  std::vector<Group> groups;
  for (size_t i = 0; i < ins_.size(); ++i) {
    const Array& in = ins_[i];
    auto group = std::ranges::find_if(groups, [&](const Group& g) {
      return g.kind == kinds[i] && g.kind != Group::Kind::alone && g.ins[0].dtype == in.dtype;
    });
    if (group == groups.end()) group = groups.insert(groups.end(), Group{kinds[i], {}, {}, {}});
    group->items.push_back(i);
    group->ins.push_back(in);
    if (!only_sends_) group->outs.push_back(outs_[i]);
  }
  return groups;
}

// Whether any buffers of the groups overlap, other than an input that is its own output.
bool any_overlap(const std::vector<Group>& groups) {
  std::vector<Extent> extents;
  for (const Group& group : groups) {
    for (size_t i = 0; i < group.ins.size(); ++i) {
      extents.push_back(extent_of(group.ins[i], i));
      if (!group.outs.empty() && group.outs[i].data != group.ins[i].data) {
        extents.push_back(extent_of(group.outs[i], i));
      }
    }
  }
  return find_overlap(std::move(extents)).has_value();
}

// Makes this a call on `data`, in place.
void take_in_place(Invocation& call, const Array& data) {
  call.in = call.out = data;
  call.request.call.counts.assign(1, data.count);
  call.request.call.in_place = true;
}

// Makes this a call on a large buffer, which is not copied.
void take_alone(Invocation& call, Group group, std::shared_ptr<void> keep) {
  const bool in_place = group.in_place();
  take_in_place(call, group.ins[0]);
  call.request.call.in_place = in_place;
  if (!group.outs.empty()) call.out = std::move(group.outs[0]);
  call.then = [keep = std::move(keep)] {};
}

// A group with the memory that its buffers are packed in.
struct Packed {
  Group group;
  Packing packing;
  std::shared_ptr<void> keep;

  Packed(Group g, std::shared_ptr<void> k)
      : group(std::move(g)),
        packing(group.ins[0].dtype, group.ins, group.kind == Group::Kind::coded ? kSegmentAlign : 1),
        keep(std::move(k)) {}
};

// Makes this a call on several buffers of one type, which are packed before and unpacked after it.
// `at_once`: they are packed now, not when the call runs.
std::shared_ptr<Packed> take_together(Invocation& call, Group group, bool at_once,
                                      std::shared_ptr<void> keep) {
  auto packed = std::make_shared<Packed>(std::move(group), std::move(keep));
  take_in_place(call, packed->packing.whole());
  call.storage = packed;
  auto pack = [packed] { packed->packing.copy_in(packed->group.ins); };
  if (at_once) {
    pack();
  } else {
    call.before = std::move(pack);
  }
  call.then = [packed] { packed->packing.copy_out(packed->group.outs); };
  return packed;
}

using Codings = std::vector<std::shared_ptr<runtime::Coding>>;

// For the last of several coded calls: if any result is not finite, the residuals of all are taken back.
void join_verdicts(Invocation& last, const Codings& codings) {
  if (codings.size() < 2) return;
  last.then = [codings, then = std::move(last.then)] {
    then();
    if (std::ranges::all_of(codings, [](const auto& coding) { return coding->finite; })) return;
    for (const auto& coding : codings) coding->residuals->take_back();
  };
}

// Unpacks exempt buffers after their call. If any is not finite, the coded calls' residuals are taken back.
void unpack_exempt(Invocation& call, std::shared_ptr<Packed> packed, Codings codings) {
  call.then = [packed = std::move(packed), codings = std::move(codings)] {
    kernels::Stats stats;
    packed->packing.unpack(packed->group.outs, 1, &stats, kernels::chosen_isa());
    if (stats.nans == 0 && stats.infs == 0) return;
    for (const auto& coding : codings) coding->residuals->take_back();
  };
}

std::vector<Segment> segments_of(const std::vector<std::string>& names, const Packing& packing) {
  const auto ids =
      py::module_::import("pycomm.bucket").attr("segment_ids")(names).cast<std::vector<uint64_t>>();
  std::vector<Segment> segments;
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto [begin, count] = packing.places()[i];
    segments.push_back({begin, begin + count, ids[i]});
  }
  return segments;
}

std::vector<Group::Kind> kinds_without_codec(const List& list) {
  std::vector<Group::Kind> kinds;
  for (size_t i = 0; i < list.size(); ++i) {
    kinds.push_back(list.in(i).bytes() >= kLongCopyBytes ? Group::Kind::alone : Group::Kind::packed);
  }
  return kinds;
}

// Adds to the list's signature which items are exempt.
std::vector<Group::Kind> kinds_with_codec(const List& list, const Coder& coder, std::string& signature) {
  Parts parts{.whole = false, .names = {}, .segments = {}, .shapes = {}};
  std::vector<size_t> all(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    all[i] = i;
    coder.check_item(list.in(i).dtype, "x[" + std::to_string(i) + "]");
    const auto& shape = list.in(i).shape;
    parts.shapes.push_back(py::tuple(py::cast(std::vector<int64_t>(shape.begin(), shape.end()))));
  }
  parts.names = coder.names(all);
  std::vector<Group::Kind> kinds(list.size(), Group::Kind::coded);
  const std::vector<size_t> exempt = coder.exempt(parts);
  for (const size_t i : exempt) kinds[i] = Group::Kind::exempt;
  if (!exempt.empty()) signature += ", " + Coder::signature(parts, exempt);
  return kinds;
}

std::vector<Invocation> check_list(const Method& method, const PyCommunicator& comm, const Arguments& args) {
  const List list(method, comm, args);
  std::optional<Coder> coder;
  std::string signature = list.signature();
  if (args.given & kCodecArguments) {
    list.require_apart();
    coder.emplace(method.name, args);
  }
  std::vector<Group> groups =
      list.group(coder ? kinds_with_codec(list, *coder, signature) : kinds_without_codec(list));
  // Coded calls run before exempt ones, whose results decide about the residuals of both.
  std::stable_partition(groups.begin(), groups.end(),
                        [](const Group& g) { return g.kind != Group::Kind::exempt; });
  const auto keep = list.keep(truth(args[Arg::async_op]));
  // If buffers overlap, one call may write what another reads: then all are packed before any call runs.
  const bool apart = (groups.size() == 1 && groups[0].kind != Group::Kind::alone) || !any_overlap(groups);
  std::vector<Invocation> calls;
  calls.reserve(groups.size());
  Codings codings;
  Invocation* last_coded = nullptr;
  for (const Group& group : groups) {
    Invocation& call = calls.emplace_back(begin_call(method, comm, args));
    std::shared_ptr<Packed> packed;
    if (group.kind == Group::Kind::alone && apart) {
      take_alone(call, group, keep);
    } else {
      packed = take_together(call, group, !apart, keep);
    }
    call.in.signature = signature;
    finish_request(call);
    if (coder) coder->check(call.request);
    if (group.kind == Group::Kind::coded) {
      Parts parts{.whole = false, .names = coder->names(group.items), .segments = {}, .shapes = {}};
      parts.segments = segments_of(parts.names, packed->packing);
      call.feeding = coder->code(call.request, parts, {}, list.item(group.items[0]), call.in.count);
      if (call.feeding) codings.push_back(call.request.coding);
      last_coded = &call;
    } else if (group.kind == Group::Kind::exempt) {
      unpack_exempt(call, packed, codings);
    }
    if (schedule::traits(method.collective).reduces) {
      require(call.request.call.dtype, call.request.call.op);  // before any of the calls runs
    }
    call.x = py::reinterpret_borrow<py::object>(args[Arg::x]);
    call.result = list.result();
  }
  if (last_coded) join_verdicts(*last_coded, codings);
  return calls;
}

Array part_of(const Array& whole, const Segment& segment) {
  Array part;
  part.data = static_cast<char*>(whole.data) + segment.begin * static_cast<int64_t>(size_of(whole.dtype));
  part.dtype = whole.dtype;
  part.count = segment.end - segment.begin;
  return part;
}

// A call on one buffer with a codec, and one on the tensors in it that are exempt from the codec.
std::vector<Invocation> check_coded(const Method& method, const PyCommunicator& comm, const Arguments& args,
                                    Invocation first) {
  std::vector<Invocation> calls;
  calls.push_back(std::move(first));
  const Coder coder(method.name, args);
  coder.check(calls[0].request);
  const Parts parts = coder.parts_of(args[Arg::x]);
  const bool can_exempt = schedule::traits(method.collective).one_block();
  const auto exempt = can_exempt ? coder.exempt(parts) : std::vector<size_t>();
  if (!exempt.empty() && exempt.size() == parts.segments.size()) return calls;
  {
    Invocation& call = calls[0];
    call.feeding = coder.code(call.request, parts, exempt, args[Arg::x], call.in.count);
  }
  if (exempt.empty()) return calls;
  const std::string signature = Coder::signature(parts, exempt);
  // If ranks exempt different tensors, the first call must differ. Its tag has little room.
  std::string& tag = calls[0].request.tag;
  tag = signature.substr(0, signature.find(':')) + (tag.empty() ? "" : ", ") + tag;
  Group group{Group::Kind::exempt, exempt, {}, {}};
  for (const size_t i : exempt) {
    group.ins.push_back(part_of(calls[0].in, parts.segments[i]));
    group.outs.push_back(part_of(calls[0].out, parts.segments[i]));
  }
  Invocation& apart = calls.emplace_back(begin_call(method, comm, args));
  const auto packed = take_together(apart, std::move(group), false, nullptr);
  // The coded call overwrites the exempt tensors: they are packed before it, and unpacked after their own.
  calls[0].before = std::exchange(apart.before, nullptr);
  unpack_exempt(apart, packed, {calls[0].request.coding});
  apart.in.signature = signature;
  finish_request(apart);
  apart.x = calls[0].x;
  apart.result = calls[0].result;
  return calls;
}

}  // namespace

std::vector<Invocation> check_calls(const Method& method, const PyCommunicator& comm, const Arguments& args) {
  PyObject* x = args[Arg::x];
  if (schedule::traits(method.collective).takes_list && x && (PyList_Check(x) || PyTuple_Check(x))) {
    return check_list(method, comm, args);
  }
  Invocation call = check_call(method, comm, args);
  if (args.given & kCodecArguments) return check_coded(method, comm, args, std::move(call));
  std::vector<Invocation> calls;
  calls.push_back(std::move(call));
  return calls;
}

}  // namespace pycomm::bindings
