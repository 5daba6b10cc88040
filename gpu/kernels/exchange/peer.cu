// Ranges of bytes from device to device over peer memory: experts' rows to where they belong among the rows of
// their expert, and back. Bits are moved, and nothing is added.
//
// A transfer is three grids on a stream of its own. Every member of the group has a mailbox in its memory, with
// a box for each member; `theirs` is the box about us there, `ours` the box about them here.
//
//   peer_ready  tells every member that sends to us where its ranges belong, and waits for those that we send
//               to: their new buffers are there, and free of older work.
//   peer_move   copies our ranges to where they belong. It waits for nobody, however many SMs it has.
//   peer_done   tells the members that all of it is there, and waits for what comes to us.
//
// CONSTANTS
//   PAIR_WORDS, BOX_WORDS  words of 64 bits of a Pair, and of a Box before its ranges, as gpu/src/peer.rs has them
//   MOVE_THREADS           threads of a CTA of peer_move
//   CHUNK_BYTES            bytes that such a CTA copies at once
// LAUNCH
//   peer_ready, peer_done: one CTA, a warp a member. peer_move: any number of CTAs of MOVE_THREADS.
// NOTES
// - The only grids that spin have one CTA of a few warps: however many groups wait at once, SMs are left for
//   what they wait for.
// - Numbers of transfers ascend by pair and direction, so no flag is ever set back. A box is written anew only
//   when the transfer before is over on both sides.
// - Who finds that a member has left (its rank has failed) moves nothing, says nothing, and ends: its host is
//   told by the others' hosts.
// - The two sides agree on numbers and sizes of ranges, or the grid ends (trap).
#include "ptx/system.cuh"

// What goes between us and one member.
struct Pair {
    u64 theirs, ours;
    u64 out_number, out_first, out_count, out_bytes;
    u64 in_number, in_first, in_count, in_bytes;
};

struct Range {
    u64 address, bytes;
};

struct Box {
    // They are ready to receive the transfer of this number, so many ranges of it: below.
    u64 ready, count;
    // They have sent the transfer of this number, so many bytes.
    u64 done, bytes;
    // Not zero: they have left.
    u64 left;
    u64 unused[3];
};

static_assert(sizeof(Pair) == 8 * PAIR_WORDS, "the host writes pairs of so many words");
static_assert(sizeof(Box) == 8 * BOX_WORDS, "the host finds ranges behind so many words");

constexpr u32 WARP = 32;
// Vectors that a thread has under way.
constexpr u32 HELD = CHUNK_BYTES / (MOVE_THREADS * sizeof(uint4));
static_assert(HELD * MOVE_THREADS * sizeof(uint4) == CHUNK_BYTES, "a chunk is whole vectors a thread");

FATHOM_DEVICE Range* ranges_of(Box* box) { return reinterpret_cast<Range*>(box + 1); }

// Waits for the transfer of this number, or a later one; false where who is to say so has left.
FATHOM_DEVICE bool wait_for(const u64* flag, u64 number, const Box* box) {
    while (load_acquire_system(flag) < number) {
        // What was said before it left counts.
        if (load_acquire_system(&box->left) != 0) return load_acquire_system(flag) >= number;
        __nanosleep(100);
    }
    return true;
}

extern "C" __global__ void peer_ready(const Pair* __restrict__ pairs, const Range* __restrict__ out,
                                      const Range* __restrict__ in, u64* __restrict__ to) {
    const Pair pair = pairs[threadIdx.x / WARP];
    const u32 lane = threadIdx.x % WARP;
    if (pair.in_count > 0) {
        Box* box = reinterpret_cast<Box*>(pair.theirs);
        for (u64 i = lane; i < pair.in_count; i += WARP) ranges_of(box)[i] = in[pair.in_first + i];
        if (lane == 0) box->count = pair.in_count;
        __syncwarp();
        if (lane == 0) store_release_system(&box->ready, pair.in_number);
    }
    if (pair.out_count > 0) {
        Box* box = reinterpret_cast<Box*>(pair.ours);
        bool here = false;
        if (lane == 0) {
            here = wait_for(&box->ready, pair.out_number, box);
            if (here && box->count != pair.out_count) __trap();
        }
        here = __shfl_sync(0xFFFFFFFFu, here, 0);
        __syncwarp();
        for (u64 i = lane; i < pair.out_count; i += WARP) {
            const u64 at = pair.out_first + i;
            const Range range = ranges_of(box)[i];
            if (here && range.bytes != out[at].bytes) __trap();
            to[at] = here ? range.address : 0;
        }
    }
}

// Copies what all threads of a CTA copy at once, `bytes` of them at most CHUNK_BYTES.
template <typename Vector>
FATHOM_DEVICE void move_as(const u8* __restrict__ from, u8* __restrict__ to, u32 bytes) {
    const u32 n = bytes / sizeof(Vector);
    const Vector* source = reinterpret_cast<const Vector*>(from);
    Vector* target = reinterpret_cast<Vector*>(to);
    for (u32 first = threadIdx.x; first < n; first += HELD * MOVE_THREADS) {
        Vector held[HELD];
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            if (first + i * MOVE_THREADS < n) held[i] = source[first + i * MOVE_THREADS];
        }
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            if (first + i * MOVE_THREADS < n) target[first + i * MOVE_THREADS] = held[i];
        }
    }
    for (u32 i = n * sizeof(Vector) + threadIdx.x; i < bytes; i += MOVE_THREADS) to[i] = from[i];
}

// first[r] is the number of range r's first chunk; first[ranges] that of all chunks.
extern "C" __global__ void __launch_bounds__(MOVE_THREADS)
    peer_move(const Range* __restrict__ out, const u64* __restrict__ to, const u64* __restrict__ first,
              u32 ranges) {
    for (u64 chunk = blockIdx.x; chunk < first[ranges]; chunk += gridDim.x) {
        // The last range whose first chunk is not behind this one.
        u32 low = 0, high = ranges;
        while (high - low > 1) {
            const u32 middle = (low + high) / 2;
            if (first[middle] <= chunk) low = middle;
            else high = middle;
        }
        if (to[low] == 0) continue;
        const u64 offset = (chunk - first[low]) * CHUNK_BYTES;
        const u64 left = out[low].bytes - offset;
        const u32 bytes = left < CHUNK_BYTES ? left : CHUNK_BYTES;
        const u8* source = reinterpret_cast<const u8*>(out[low].address) + offset;
        u8* target = reinterpret_cast<u8*>(to[low]) + offset;
        const u64 alignment = (u64)source | (u64)target;
        if (alignment % sizeof(uint4) == 0) move_as<uint4>(source, target, bytes);
        else if (alignment % sizeof(u32) == 0) move_as<u32>(source, target, bytes);
        else move_as<u8>(source, target, bytes);
    }
    // Performed at the other devices before the grid ends: peer_done's release comes behind that.
    __threadfence_system();
}

extern "C" __global__ void peer_done(const Pair* __restrict__ pairs, const u64* __restrict__ to) {
    const Pair pair = pairs[threadIdx.x / WARP];
    if (threadIdx.x % WARP != 0) return;
    if (pair.out_count > 0 && to[pair.out_first] != 0) {
        Box* box = reinterpret_cast<Box*>(pair.theirs);
        box->bytes = pair.out_bytes;
        store_release_system(&box->done, pair.out_number);
    }
    if (pair.in_count > 0) {
        Box* box = reinterpret_cast<Box*>(pair.ours);
        if (wait_for(&box->done, pair.in_number, box) && box->bytes != pair.in_bytes) __trap();
    }
}
