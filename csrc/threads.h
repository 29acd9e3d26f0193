// A team of threads that lives for one call: nothing survives the call, so forking is safe, calls from several Python
// threads do not meet, and no OpenMP runtime can clash with the one inside torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

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

class Team {
public:
    // One thread's view of the team. Every member must make the same sequence of for_each calls.
    class Member {
    public:
        Member(Team& team, int rank) : team_(team), rank_(rank) {}
        int rank() const { return rank_; }

        // Calls work(i) for each i in [0, count), then waits for the other members. A member begins with its own
        // contiguous share and then takes over what is left of the others' shares.
        template <class Work>
        void for_each(int64_t count, const Work& work) {
            Queue* queues = team_.queues_[phase_].get();
            phase_ = 1 - phase_;
            // Nobody touches the other set before the barrier below.
            team_.queues_[phase_][rank_].taken.store(0, std::memory_order_relaxed);
            for (int i = 0; i < team_.size_; i++) {
                const int owner = (rank_ + i) % team_.size_;
                const int64_t begin = count * owner / team_.size_;
                const int64_t end = count * (owner + 1) / team_.size_;
                for (;;) {
                    const int64_t item = begin + queues[owner].taken.fetch_add(1, std::memory_order_relaxed);
                    if (item >= end) break;
                    work(item);
                }
            }
            team_.barrier();
        }

    private:
        Team& team_;
        int rank_;
        int phase_ = 0;
    };

    // Runs body(member) on up to `threads` threads, the calling one included: fewer where the system gives no more.
    template <class Body>
    static void run(int threads, const Body& body) {
        Team team(threads);
        std::vector<std::thread> workers;
        std::atomic<int> size{0};
        for (int rank = 1; rank < threads; rank++) {
            try {
                workers.emplace_back([&, rank] {
                    for (int spins = 0; size.load(std::memory_order_acquire) == 0; spins++) relax(spins);
                    team.join(rank, body);
                });
            } catch (const std::system_error&) {
                break;
            }
        }
        team.size_ = 1 + int(workers.size());
        size.store(team.size_, std::memory_order_release);
        team.join(0, body);
        for (std::thread& worker : workers) worker.join();
    }

private:
    struct alignas(64) Queue {
        std::atomic<int64_t> taken{0};
    };

    explicit Team(int threads) : size_(threads) {
        for (auto& queues : queues_) queues.reset(new Queue[threads]);
    }

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

    void barrier() {
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) relax(spins);
    }

    int size_;
    std::unique_ptr<Queue[]> queues_[2];
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace fastnca
