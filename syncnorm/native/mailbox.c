/* How ranks of one host wait for one another's frames: each rank has a number in shared memory, the number of frames
   that it has sent. A frame is written first and counted then; a rank that sees the count also sees the frame, on any
   processor, because the count is stored with release and loaded with acquire semantics (C11, section 5.1.2.4). */

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define SPIN_NS 20000          /* a peer that is in step comes within that time */
#define YIELD_NS 500000        /* then the core is offered to others, perhaps to that peer */
#define LONGEST_PAUSE_NS 1000000

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ __volatile__("yield");
#endif
}

/* Whatever this rank wrote before is visible to a rank that sees `number`. */
void publish(_Atomic int64_t *sent, int64_t number) {
    atomic_store_explicit(sent, number, memory_order_release);
}

/* Waits until each of the numbers at `base + offsets[i]`, i < `ranks`, is at least `number`; at most `max_ns`.
   Returns the index of the first one that is not, or `ranks`. `waited_ns` is how long the caller has waited before:
   it spins at first, then yields, then sleeps, each time for a tenth of its whole wait. */
int64_t wait_for(const char *base, const int64_t *offsets, int64_t ranks, int64_t number, int64_t waited_ns,
                 int64_t max_ns) {
    int64_t began = 0, missing = 0;
    for (;;) {
        while (missing < ranks &&
               atomic_load_explicit((const _Atomic int64_t *)(base + offsets[missing]), memory_order_acquire) >= number)
            missing++;
        if (missing == ranks) return missing;
        int64_t now = now_ns();
        if (!began) began = now;
        if (now - began >= max_ns) return missing;
        int64_t waited = waited_ns + now - began;
        if (waited < SPIN_NS) {
            relax();
        } else if (waited < YIELD_NS) {
            sched_yield();
        } else {
            int64_t pause = waited / 10 < LONGEST_PAUSE_NS ? waited / 10 : LONGEST_PAUSE_NS;
            nanosleep(&(struct timespec){.tv_nsec = pause}, 0);
        }
    }
}

enum { KIND, KEY, NUMBER, SIZE, VALUES, HEADER }; /* the fields of a header, see frames.py */

/* The whole of a usual exchange. Writes the header and the payload of rank `own` into its slot, which is `slot` bytes
   after its number, and publishes it as frame `number`; then waits for the other ranks, at most `max_ns`. Returns 1 if
   all frames are there and belong to the same call as this one; `values` then has the last field of each header. */
int swap(char *base, const int64_t *offsets, int64_t ranks, int64_t own, int64_t slot, int64_t number, int64_t max_ns,
         const int64_t *header, const void *payload, int64_t *values) {
    char *frame = base + offsets[own] + slot;
    memcpy(frame, header, HEADER * sizeof *header);
    memcpy(frame + HEADER * sizeof *header, payload, header[SIZE]);
    publish((_Atomic int64_t *)(base + offsets[own]), number);
    if (wait_for(base, offsets, ranks, number, 0, max_ns) < ranks) return 0;
    for (int64_t rank = 0; rank < ranks; rank++) {
        const int64_t *other = (const int64_t *)(base + offsets[rank] + slot);
        if (memcmp(other, header, VALUES * sizeof *header)) return 0;
        values[rank] = other[VALUES];
    }
    return 1;
}
