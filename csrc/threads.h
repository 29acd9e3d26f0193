// A team of threads that lives for one call: no thread works on after it, so forking is safe, calls from several Python
// threads do not meet, and no OpenMP runtime can clash with the one inside torch.
#pragma once

#include <atomic>
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
#if defined(__x86_64__)
    DenormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~DenormalsAreZero() { _mm_setcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__)
    DenormalsAreZero() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
        __asm__ volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t(1) << 24)));
    }
    ~DenormalsAreZero() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

private:
    uint64_t before_;
#endif
};

// A phase (for_each) ends when its work is done, not when every member has come: one that the system starts late, or
// takes the processor from, is not waited for unless it holds work. Other thread pools spin on the same processors for
// milliseconds after their last job, the length of a short call.
class Team {
public:
    // One thread's view of the team. Every member must make the same sequence of for_each calls.
    class Member {
    public:
        Member(Team& team, int rank) : team_(team), rank_(rank) {}
        int rank() const { return rank_; }

        // Calls work(i) for each i in [0, count), by some member, and returns when all of them are done. A member
        // begins with its own contiguous share and then takes over what is left of the others' shares.
        template <class Work>
        void for_each(int64_t count, const Work& work) {
            if (count == 0) return;
            int64_t done = 0;
            for (int i = 0; i < team_.size_; i++) {
                const int owner = (rank_ + i) % team_.size_;
                const int64_t begin = count * owner / team_.size_;
                const int64_t end = count * (owner + 1) / team_.size_;
                for (int64_t item; (item = begin + team_.take(owner, phase_, end - begin)) < end; done++) work(item);
            }
            team_.finish(phase_++, done, count);
        }

    private:
        Team& team_;
        int rank_;
        uint32_t phase_ = 0;
    };

    // Runs body(member) on up to `threads` threads, the calling one included: fewer where the system gives no more.
    template <class Body>
    static void run(int threads, const Body& body) {
        const auto team = std::make_shared<Team>(threads);
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
    }

    explicit Team(int size) : size_(size), queues_(new Queue[size]) {}

private:
    // Items taken of a member's share, below the phase that they belong to.
    struct alignas(64) Queue {
        std::atomic<uint64_t> phase_and_taken{0};
    };

    template <class Body>
    void join(int rank, const Body& body) {
        const DenormalsAreZero mode;
        Member member(*this, rank);
        body(member);
    }

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
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) relax(spins);
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

    const int size_;
    const std::unique_ptr<Queue[]> queues_;
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> inside_{0};
};

}  // namespace fastnca
