// Loops whose items are shared by a few threads, none of which waits for one that the system does not run.
//
// At the end of an OpenMP loop every thread must have come by, also one that the system keeps waiting for a processor
// and that has nothing left to do. With other processes beside, each of the thousand loops of a training step may
// then cost a time slice. Here the caller does whatever nobody else has begun, and waits for begun items alone.
// Waiting threads spin for a moment, because that is faster than sleeping where processors are idle, and then sleep.
//
// OpenMP's own threads, which torch's operators use, spin for 20 ms if nothing tells them not to, and would hold
// processors that the helpers need. Then OpenMP's threads do these items, too: they are there anyway.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <system_error>
#include <thread>

namespace r1pipe {

constexpr std::chrono::microseconds PATIENCE{100};  // spent spinning: about what sleeping and waking up costs

template <typename Done>
inline bool soon(Done done) {
  const auto end = std::chrono::steady_clock::now() + PATIENCE;
  do {
    for (int i = 0; i < 16; i++) {
      if (done()) return true;
      _mm_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// The helpers of a process. One loop at a time has them; another caller's, or one inside an item, runs alone. In a
// forked process there are none, and the caller does everything.
class Pool {
 public:
  static Pool& shared() {
    static Pool* const pool = new Pool;  // never destroyed: its threads use it until the process ends
    return *pool;
  }

  template <typename Work>
  void run(int64_t items, const Work& work) {
    const int64_t threads = std::min<int64_t>(omp_get_max_threads(), items);
    if (threads < 2 || taken.test_and_set(std::memory_order_acquire)) {
      for (int64_t i = 0; i < items; i++) work(i);
      return;
    }
    begin(items, threads - 1, [](const void* of, int64_t i) { (*static_cast<const Work*>(of))(i); }, &work);
    do_items(round.load(std::memory_order_relaxed));
    const auto done = [this] { return pending.load(std::memory_order_acquire) == 0; };
    if (!soon(done))
      for (uint32_t left; (left = pending.load(std::memory_order_acquire));) pending.wait(left);
    taken.clear(std::memory_order_release);
  }

 private:
  using Function = void (*)(const void*, int64_t);

  std::atomic_flag taken;
  std::atomic<uint32_t> round{0};    // of the current loop; sleeping helpers wait for the next one
  std::atomic<uint32_t> pending{0};  // items not finished
  std::atomic<uint64_t> ticket{0};   // round, and (low half) items that nobody has begun
  std::atomic<Function> function;    // these four change only while no item of any round is left
  std::atomic<const void*> of;
  std::atomic<int64_t> count, helpers;
  int64_t started = 0;

  void begin(int64_t items, int64_t wanted, Function call, const void* work) {
    const uint32_t last = round.load(std::memory_order_relaxed);
    try {
      for (; started < wanted; started++) std::thread([this, which = started, last] { help(which, last); }).detach();
    } catch (const std::system_error&) {  // no more threads here: those that there are do
    }
    function.store(call, std::memory_order_relaxed);
    of.store(work, std::memory_order_relaxed);
    count.store(items, std::memory_order_relaxed);
    helpers.store(wanted, std::memory_order_relaxed);
    pending.store(items, std::memory_order_relaxed);
    ticket.store(uint64_t(last + 1) << 32 | items, std::memory_order_release);
    round.store(last + 1);
    round.notify_all();
  }

  // Does items of a round until all are begun. What is read before a successful exchange was the round's own, because
  // an item of it was left.
  void do_items(uint32_t of_round) {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (uint32_t(seen >> 32) == of_round && uint32_t(seen)) {
      const Function call = function.load(std::memory_order_relaxed);
      const void* work = of.load(std::memory_order_relaxed);
      const int64_t item = count.load(std::memory_order_relaxed) - uint32_t(seen);
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      call(work, item);
      if (pending.fetch_sub(1, std::memory_order_acq_rel) == 1) pending.notify_one();
      seen = ticket.load(std::memory_order_acquire);
    }
  }

  [[noreturn]] void help(int64_t which, uint32_t last) {
    for (;; last = round.load(std::memory_order_acquire), which < helpers.load() ? do_items(last) : void()) {
      if (!soon([&] { return round.load(std::memory_order_relaxed) != last; })) round.wait(last);
    }
  }
};

// work(i) for every i in [0, items), in no order, by as many threads as OpenMP would use.
template <typename Work>
inline void share(int64_t items, const Work& work) {
  static const bool calm = std::getenv("GOMP_SPINCOUNT") || std::getenv("OMP_WAIT_POLICY");
  if (calm) return Pool::shared().run(items, work);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < items; i++) work(i);
}

// work(first, count) for blocks of rows.
template <typename Work>
inline void share_rows(int64_t rows, int64_t block, const Work& work) {
  share((rows + block - 1) / block, [&](int64_t i) { work(i * block, std::min(block, rows - i * block)); });
}

}  // namespace r1pipe
