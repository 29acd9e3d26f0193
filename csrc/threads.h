// A team of threads that lives for one call: no thread works on after it, so forking is safe, calls from several Python
// threads do not meet, and no OpenMP runtime can clash with the one inside torch.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastnca {

// While it lives, the thread's denormal operands and results count as zero. Gradients of long rollouts fade into the
// denormal range, where a multiply-add takes a hundred times its time.
class DenormalsAreZero {
public:
    DenormalsAreZero() : before_(mode()) { set_mode(before_ | kZero); }
    ~DenormalsAreZero() { set_mode(before_); }

    // Calls work() in the mode that the thread had before.
    template <class Work>
    auto outside(const Work& work) const {
        set_mode(before_);
        const auto result = work();
        set_mode(before_ | kZero);
        return result;
    }

private:
#if defined(__x86_64__)
    static constexpr uint64_t kZero = 0x8040;
    static uint64_t mode() { return _mm_getcsr(); }
    static void set_mode(uint64_t mode) { _mm_setcsr(unsigned(mode)); }
#elif defined(__aarch64__)
    static constexpr uint64_t kZero = uint64_t(1) << 24;
    static uint64_t mode() {
        uint64_t mode;
        __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
        return mode;
    }
    static void set_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
    static constexpr uint64_t kZero = 0;
    static uint64_t mode() { return 0; }
    static void set_mode(uint64_t) {}
#endif

    uint64_t before_;
};

// A phase (for_each) ends when its work is done, not when every member has come: one that the system starts late, or
// takes the processor from, is not waited for unless it holds work. Other thread pools spin on the same processors for
// milliseconds after their last job, the length of a short call.
class Team {
public:
    // Says whether the work is to end early.
    using Interrupted = bool (*)();

    // One thread's view of the team. Every member must make the same sequence of for_each calls.
    class Member {
    public:
        Member(Team& team, int rank) : team_(team), rank_(rank) {}
        int rank() const { return rank_; }

        // Calls work(i) for each i in [0, count), by some member, and returns when all of them are done. A member
        // begins with its own contiguous share and then takes over what is left of the others' shares. Once the team
        // is interrupted no more work begins, and this returns at once.
        template <class Work>
        void for_each(int64_t count, const Work& work) {
            if (count == 0) return;
            int64_t done = 0;
            for (int i = 0; i < team_.size_; i++) {
                const int owner = (rank_ + i) % team_.size_;
                const int64_t begin = count * owner / team_.size_;
                const int64_t end = count * (owner + 1) / team_.size_;
                for (int64_t item; !interrupted(); done++) {
                    item = begin + team_.take(owner, phase_, end - begin);
                    if (item >= end) break;
                    work(item);
                }
            }
            team_.finish(phase_++, done, count);
        }

    private:
        bool interrupted() const {
            if (rank_ == 0) team_.ask(mode_);
            return team_.stopped();
        }

        const DenormalsAreZero mode_;
        Team& team_;
        const int rank_;
        uint32_t phase_ = 0;
    };

    // Runs body(member) on up to `threads` threads, the calling one included: fewer where the system gives no more.
    // The calling thread asks interrupted(), unless that is null, about every 50 ms and between two pieces of work.
    // Returns whether all the work was done.
    template <class Body>
    static bool run(int threads, Interrupted interrupted, const Body& body) {
        const auto team = std::make_shared<Team>(threads, interrupted);
        for (int rank = 1; rank < threads; rank++) {
            try {
                std::thread([team, &body, rank] {
                    if (!team->enter()) return;
                    team->join(rank, body);
                    team->leave();
                }).detach();
            } catch (const std::system_error&) {
                break;
            }
        }
        team->join(0, body);
        team->close();
        return !team->stopped();
    }

    Team(int size, Interrupted interrupted) : size_(size), interrupted_(interrupted), queues_(new Queue[size]) {}

private:
    // Items taken of a member's share, below the phase that they belong to.
    struct alignas(64) Queue {
        std::atomic<uint64_t> phase_and_taken{0};
    };

    template <class Body>
    void join(int rank, const Body& body) {
        Member member(*this, rank);
        body(member);
    }

    // In the calling thread alone, and where it holds no work: the others go on while it waits for an answer.
    void ask(const DenormalsAreZero& mode) {
        if (!interrupted_ || stopped()) return;
        const auto now = Clock::now();
        if (now - asked_ < std::chrono::milliseconds(50)) return;
        if (mode.outside(interrupted_)) stopped_.store(true, std::memory_order_relaxed);
        asked_ = Clock::now();
    }

    bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

    static void relax(int spins) {
        // A step takes a few hundred microseconds at least; after waiting for so long the core may be shared.
        if (spins > 2000) {
            std::this_thread::yield();
            return;
        }
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    // The next item of the owner's share, or `count` where none is left or the phase is over.
    int64_t take(int owner, uint32_t phase, int64_t count) {
        std::atomic<uint64_t>& next = queues_[owner].phase_and_taken;
        uint64_t seen = next.load(std::memory_order_relaxed);
        for (;;) {
            const int64_t taken = int64_t(uint32_t(seen));
            if (uint32_t(seen >> 32) != phase || taken >= count) return count;
            if (next.compare_exchange_weak(seen, seen + 1, std::memory_order_relaxed)) return taken;
        }
    }

    // Whoever did the last item opens the next phase; the others wait for that.
    void finish(uint32_t phase, int64_t done, int64_t count) {
        if (done > 0 && done_.fetch_add(done, std::memory_order_acq_rel) + done == count) {
            done_.store(0, std::memory_order_relaxed);
            for (int i = 0; i < size_; i++)
                queues_[i].phase_and_taken.store(uint64_t(phase + 1) << 32, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase && !stopped(); spins++) relax(spins);
    }

    // The caller waits for the threads inside, so that what `body` refers to outlives them. One that starts when all is
    // done finds the door closed and touches nothing but the team, which it shares.
    bool enter() {
        int inside = inside_.load(std::memory_order_relaxed);
        while (inside >= 0)
            if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) return true;
        return false;
    }
    void leave() { inside_.fetch_sub(1, std::memory_order_release); }
    void close() {
        inside_.fetch_sub(kClosed, std::memory_order_relaxed);
        for (int spins = 0; inside_.load(std::memory_order_acquire) != -kClosed; spins++) relax(spins);
    }

    static constexpr int kClosed = 1 << 30;
    using Clock = std::chrono::steady_clock;

    const int size_;
    const Interrupted interrupted_;
    Clock::time_point asked_ = Clock::now();
    const std::unique_ptr<Queue[]> queues_;
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> inside_{0};
    alignas(64) std::atomic<bool> stopped_{false};
};

}  // namespace fastnca
