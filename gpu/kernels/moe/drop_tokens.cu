// Capacity: slots for which a device has no room are dropped, to the bit the op drop_tokens of the reference
// (reference/src/ops/drop_tokens.rs). A device keeps exempt slots, then those of highest affinity, ties to the
// lowest slot; the index of a dropped one becomes -1.
//
//   drop     a slot's rank is the number of its device's slots that precede it
//   dropped  how many slots each device drops
//
// LAUNCH
//   drop: a thread a slot. dropped: a warp a device, 128 threads.
// NOTES
// - exempt has an entry a token: 1 where its sequence loses no slot.
// - An index that names no expert ends the grid (trap); the reference refuses it.
#include "common/float.cuh"

extern "C" __global__ void drop(const int* __restrict__ indices, const float* __restrict__ scores,
                                const int* __restrict__ exempt, int* __restrict__ kept, u32 slots, u32 top_k,
                                u32 experts, u32 share, u32 room) {
    u32 slot = (u32)thread_index();
    if (slot >= slots) return;
    u32 expert = (u32)indices[slot];
    if (expert >= experts) __trap();
    float own = scores[(u64)(slot / top_k) * experts + expert];
    int own_exempt = exempt[slot / top_k];
    u32 rank = 0;
    for (u32 other = 0; other < slots; other++) {
        u32 e = (u32)indices[other];
        if (e >= experts || e / share != expert / share) continue;
        float score = scores[(u64)(other / top_k) * experts + e];
        int first = exempt[other / top_k];
        bool precedes = first != own_exempt ? first > own_exempt
                        : score != own      ? score > own
                                            : other < slot;
        rank += precedes;
    }
    kept[slot] = rank >= room && !own_exempt ? -1 : (int)expert;
}

extern "C" __global__ void __launch_bounds__(128)
    dropped(const int* __restrict__ indices, const int* __restrict__ kept, int* __restrict__ counts,
            u32 slots, u32 devices, u32 share) {
    u32 device = (u32)(thread_index() / 32);
    u32 lane = threadIdx.x % 32;
    if (device >= devices) return;
    u32 count = 0;
    for (u32 slot = lane; slot < slots; slot += 32) {
        count += (u32)indices[slot] / share == device && kept[slot] < 0;
    }
    count = __reduce_add_sync(0xFFFFFFFFu, count);
    if (lane == 0) counts[device] = (int)count;
}
