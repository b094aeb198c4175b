// The calls that a communicator has made, ready to run again: a training loop makes the same ones in every
// step, and to check and bind a small one takes longer than to run it.
//
// A call is known if everything that the checks and the bind look at is as it was: the method, the buffers
// as get_array reads them now, and the other arguments but `step`, which must be the very same objects. A
// bound call depends on two things that change outside of calls: where symmetric memory lies, and which
// algorithms there are. Code that changes either must call clear(). run() checks the group's state.
//
// Of the caller's objects the memo keeps alive only strings, numbers, bools and plain codecs, never a
// buffer. It is used under the interpreter's lock. A call may give up the lock while it is bound and while
// it runs; no other call gets its place meanwhile.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <optional>

#include "bindings/arguments.h"
#include "bindings/array.h"
#include "runtime/communicator.h"

namespace pycomm::bindings {

struct Method;

class Memo {
  struct Entry;

 public:
  // A call as the caller makes it; all in it is borrowed.
  struct Query {
    const Method* method;
    const Arguments* args;
    Array x, out;

    Query(const Method& m, const Arguments& a) : method(&m), args(&a) {}
    bool read_buffers();  // false: calls with such buffers are not kept
  };
  struct Call {
    runtime::Bound bound;
    std::optional<Arg> result;  // the argument that the method returns; if empty, it returns None
    bool eager = false;
  };
  // The place of a call, which no other call gets while this lives; or nothing.
  class Use {
   public:
    Use() = default;
    Use(const Use&) = delete;
    ~Use();
    explicit operator bool() const { return entry_; }
    Call& operator*() const;
    Call* operator->() const { return &**this; }
    void keep() const;  // the place is filled in: find() may find it

   private:
    friend class Memo;
    explicit Use(Entry& entry);
    Entry* entry_ = nullptr;
  };

  Memo() = default;
  Memo(const Memo&) = delete;
  ~Memo();

  Use find(const Query& query);
  // A place for this call, or nothing. To be claimed before the call is checked: if clear() is called after
  // that, the call may be bound to what was there before, and is not found again.
  Use claim(const Query& query);
  void clear() { ++generation_; }

 private:
  static constexpr int kLogEntries = 8;
  static constexpr size_t kMaxDims = 6;
  struct Place {  // a buffer, by value
    const void* data;
    DType dtype;
    bool writable;
    size_t num_dims;
    std::array<int64_t, kMaxDims> shape;

    void assign(const Array& buffer);
    bool is(const Array& buffer) const;
  };
  struct Entry {
    bool known = false;
    int uses = 0;
    uint64_t generation;
    const Method* method;
    Place x, out;
    Arguments args;  // owned references, except x, out and step, which are not looked at
    Call call;
  };
  Entry& entry_of(const Query& query);

  std::array<Entry, 1 << kLogEntries> entries_;
  uint64_t generation_ = 0;
};

inline Memo::Use::Use(Entry& entry) : entry_(&entry) { ++entry.uses; }
inline Memo::Use::~Use() {
  if (entry_) --entry_->uses;
}
inline Memo::Call& Memo::Use::operator*() const { return entry_->call; }
inline void Memo::Use::keep() const { entry_->known = true; }

}  // namespace pycomm::bindings
