// Races in a block's shared memory: two threads at the same bytes, one of them writing, and nothing
// that orders them, whichever came first here. A thread's clock says how far it knows each thread
// to be; at a barrier all who come tell what they know to all who wait.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace memdense::device {

class Races {
 public:
  using Clock = std::vector<uint32_t>;
  enum Number { kNone = -2, kWarp = -1 };  // beside those of a block's barriers

  bool watching = false;
  int ignored = kNone;  // the barrier that orders nothing, as if it were not there
  int64_t accesses = 0, found = 0;
  std::string first;

  void begin(const char* memory, int64_t bytes, int threads) {
    if (!watching) return;
    memory_ = memory;
    places_.assign((bytes + kPlace - 1) / kPlace, {});
    clocks_.assign(threads, Clock(threads));
    for (int thread = 0; thread < threads; ++thread) clocks_[thread][thread] = 1;
  }
  void end() { memory_ = nullptr; }

  // A thread comes to a barrier, whose clock begins empty, and goes on behind it.
  void arrive(int number, Clock& barrier, int thread) {
    if (!memory_) return;
    if (number != ignored) join(barrier, clocks_[thread]);
    ++clocks_[thread][thread];
  }
  void leave(const Clock& barrier, int thread) {
    if (memory_) join(clocks_[thread], barrier);
  }

  void read(int thread, const void* from, int bytes) {
    visit(from, bytes, [&](Place& place, int64_t at) {
      if (place.written.by != thread) expect("read", "written", place.written, thread, at);
      for (Access& read : place.read) {
        if (read.by == thread) return void(read.when = clocks_[thread][thread]);
      }
      place.read.push_back({thread, clocks_[thread][thread]});
    });
  }

  void write(int thread, const void* to, int bytes) {
    visit(to, bytes, [&](Place& place, int64_t at) {
      if (place.written.by != thread) expect("written", "written", place.written, thread, at);
      for (const Access& read : place.read) {
        if (read.by != thread) expect("written", "read", read, thread, at);
      }
      place = {{thread, clocks_[thread][thread]}, {}};
    });
  }

 private:
  static constexpr int kPlace = 2;  // bytes, of the smallest values

  struct Access {
    int by = -1;
    uint32_t when = 0;
  };

  struct Place {
    Access written;
    std::vector<Access> read;  // since then
  };

  static void join(Clock& into, const Clock& from) {
    into.resize(std::max(into.size(), from.size()));
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
  }

  template <typename Visit>
  void visit(const void* pointer, int bytes, const Visit& each) {
    if (!memory_) return;
    const int64_t start = static_cast<const char*>(pointer) - memory_, size = places_.size();
    if (start < 0 || start >= size * kPlace) return;
    ++accesses;
    const int64_t end = std::min((start + bytes + kPlace - 1) / kPlace, size);
    for (int64_t i = start / kPlace; i < end; ++i) each(places_[i], i * kPlace);
  }

  // That the thread knows of what another one did before.
  void expect(const char* now, const char* before, const Access& access, int thread, int64_t at) {
    if (access.by < 0 || access.when <= clocks_[thread][access.by]) return;
    if (!found++) {
      first = "byte " + std::to_string(at) + ", " + before + " by thread " +
              std::to_string(access.by) + ", is " + now + " by " + std::to_string(thread);
    }
  }

  const char* memory_ = nullptr;
  std::vector<Place> places_;
  std::vector<Clock> clocks_;
};

}  // namespace memdense::device
