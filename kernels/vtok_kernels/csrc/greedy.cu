// Greedy selection from the products of all tokens. No header is included, so that NVRTC compiles it as it stands.
//
// A candidate travels as one 64-bit word: its score in bits that order as unsigned integers, then ~index, so that the
// largest word is the highest score and, among equals, the lowest index. A taken token is 0, below every score.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

namespace {

constexpr u32 ALL = 0xffffffffu;

// NaN highest, as torch's argmax has it; adding 0 makes one value of -0.0 and 0.0.
__device__ __forceinline__ u32 ordered(float score) {
    if (score != score) return ALL;
    u32 bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u64 candidate(float score, int index) {
    return (u64)ordered(score) << 32 | (u32)~index;
}

__device__ __forceinline__ int index_of(u64 word) { return (int)~(u32)word; }

__device__ __forceinline__ u64 warp_max(u64 word) {
#pragma unroll
    for (int apart = 16; apart > 0; apart >>= 1) {
        u64 other = __shfl_xor_sync(ALL, word, apart);
        word = other > word ? other : word;
    }
    return word;
}

// The block's maximum, in every thread, behind one barrier: calls in turn use two boxes of 32 words.
__device__ __forceinline__ u64 block_max(u64 word, u64* box) {
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    word = warp_max(word);
    if (lane == 0) box[threadIdx.x / 32] = word;
    __syncthreads();
    return warp_max(lane < warps ? box[lane] : 0);
}

enum Objective { FAR, SUM, MIN };

// One span a block, ITEMS tokens a thread in registers; one row of products is read a pick.
template <Objective OBJECTIVE, int ITEMS>
__device__ __forceinline__ void pick_tokens(
    const float* gram, const float* inverse, const float* weights, const i64* first, const float* nearest, i64* picks,
    int n, int k, int sorted
) {
    __shared__ u64 box[2][32];
    __shared__ u32 counts[32];
    int span = blockIdx.x, thread = threadIdx.x, threads = blockDim.x;
    gram += (i64)span * n * n;
    inverse += (i64)span * n;
    picks += (i64)span * k;

    float scale[ITEMS], weight[ITEMS], state[ITEMS];
    u32 taken = 0;
    u64 best = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        int token = item * threads + thread;
        bool inside = token < n;
        scale[item] = inside ? inverse[token] : 0.0f;
        weight[item] = inside && weights ? weights[(i64)span * n + token] : 1.0f;
        state[item] = OBJECTIVE == SUM ? 0.0f : __int_as_float(OBJECTIVE == FAR ? 0x7f800000 : 0xff800000);
        if (!inside) taken |= 1u << item;
        if (inside && nearest) {
            u64 word = candidate(nearest[(i64)span * n + token] * weight[item], token);
            best = word > best ? word : best;
        }
    }
    // A pick that does not exist must not become an address.
    int pick = first ? (int)min(max(first[span], (i64)0), (i64)n - 1) : index_of(block_max(best, box[1]));
    for (int step = 0; step < k; ++step) {
        if (!sorted && thread == 0) picks[step] = pick;
        if (pick % threads == thread) taken |= 1u << pick / threads;
        float own = inverse[pick];
        const float* row = gram + (i64)pick * n;
        best = 0;
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            int token = item * threads + thread;
            float cosine = token < n ? row[token] * (scale[item] * own) : 0.0f;
            float score;
            if (OBJECTIVE == FAR) {
                state[item] = fminf(state[item], fmaxf(1.0f - cosine, 0.0f));
                score = state[item] * weight[item];
            } else {
                state[item] = OBJECTIVE == SUM ? state[item] + cosine : fmaxf(state[item], cosine);
                score = -state[item];
            }
            u64 word = taken >> item & 1u ? 0 : candidate(score, token);
            best = word > best ? word : best;
        }
        if (step + 1 < k) pick = index_of(block_max(best, box[step & 1]));
    }
    if (!sorted) return;
    u32 before = 0;
    for (int item = 0; item < ITEMS; ++item) {
        int token = item * threads + thread, lane = thread % 32;
        bool chosen = token < n && (taken >> item & 1u);
        u32 warp = __ballot_sync(ALL, chosen);
        __syncthreads();
        if (lane == 0) counts[thread / 32] = __popc(warp);
        __syncthreads();
        u32 place = before + __popc(warp & ((1u << lane) - 1u));
        for (int other = 0; other < threads / 32; ++other) {
            if (other < thread / 32) place += counts[other];
            before += counts[other];
        }
        if (chosen) picks[place] = token;
    }
}

// -- clusters of blocks (sm_90 and later) ------------------------------------------------------------------------

constexpr int MOST_BLOCKS = 16;

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ u32 address_in(u32 address, u32 block) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

__device__ __forceinline__ void store_in(u64* at, u32 block, u64 word) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address_in(shared_address(at), block)), "l"(word) : "memory");
}

__device__ __forceinline__ float load_from(const float* at, u32 block) {
    float value;
    asm volatile("ld.shared::cluster.f32 %0, [%1];"
                 : "=f"(value)
                 : "r"(address_in(shared_address(at), block))
                 : "memory");
    return value;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

#endif

}  // namespace

#define PICK(NAME, OBJECTIVE, ITEMS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024) NAME##_##ITEMS(                                                \
        const float* gram, const float* inverse, const float* weights, const i64* first, const float* nearest,        \
        i64* picks, int n, int k, int sorted                                                                          \
    ) {                                                                                                               \
        pick_tokens<OBJECTIVE, ITEMS>(gram, inverse, weights, first, nearest, picks, n, k, sorted);                   \
    }
#define PICKS(NAME, OBJECTIVE) PICK(NAME, OBJECTIVE, 1) PICK(NAME, OBJECTIVE, 3) PICK(NAME, OBJECTIVE, 8)

PICKS(pick_far, FAR)
PICKS(pick_sum, SUM)
PICKS(pick_min, MIN)

// Greedy MAP of a DPP by an incremental Cholesky factorisation: one span a cluster, `width` columns a block, whose
// factors stay in its shared memory (rows from `resident` on, a multiple of four, in `spill`, (B, k - resident, N)). A
// pick costs one cluster barrier: each block writes its best candidate into every block's inbox, then reads the pick's
// factors where they lie.
//
// blockDim.x = columns * groups, columns = width rounded up to whole warps; each group sums every groups-th four rows.
extern "C" __global__ void __launch_bounds__(768) dpp_map(
    const float* gram, const float* inverse, const float* relevance, float* spill, i64* picks, int n, int k, int width,
    int columns, int blocks, int resident
) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(16) float memory[];
    __shared__ u64 box[2][32];
    __shared__ u64 inbox[2][MOST_BLOCKS];
    int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32;
    int groups = threads / columns, group = thread / columns, local = thread % columns;
    int span = blockIdx.x / blocks, block = blockIdx.x % blocks;
    int token = block * width + local;
    bool mine = local < width && token < n;
    float* column = memory;                   // the pick's factors: k, rounded up to four
    float* partial = column + (k + 3) / 4 * 4;  // groups x columns
    float* factors = partial + threads;         // resident x width
    gram += (i64)span * n * n;
    inverse += (i64)span * n;
    picks += (i64)span * k;
    if (relevance) relevance += (i64)span * n;
    if (spill) spill += (i64)span * (k - resident) * n;

    float scale = mine ? inverse[token] : 0.0f;
    float r = mine && relevance ? relevance[token] : 1.0f;
    // r^2 by construction; the rounded squares of unit rows would decide between equals.
    float residual = scale > 0.0f ? r * r : 0.0f;
    bool open = mine && group == 0;
    cluster_sync();  // every block runs before another one writes into it
    for (int step = 0;; ++step) {
        u64 best = block_max(open ? candidate(residual, token) : 0, box[step & 1]);
        if (thread < blocks) store_in(&inbox[step & 1][block], thread, best);
        cluster_sync();
        best = warp_max(lane < blocks ? inbox[step & 1][lane] : 0);
        int pick = index_of(best);
        if (block == 0 && thread == 0) picks[step] = pick;
        if (step + 1 == k) break;

        float product = open ? gram[(i64)pick * n + token] : 0.0f;
        float own = inverse[pick], own_r = relevance ? relevance[pick] : 1.0f;
        int owner = pick / width, place = pick % width;
        for (int row = thread; row < step; row += threads)
            column[row] = row < resident ? load_from(factors + row * width + place, owner)
                                         : __ldcg(spill + (i64)(row - resident) * n + pick);
        __syncthreads();

        float explained = 0.0f;
        for (int row = 4 * group; mine && row < step; row += 4 * groups) {
            float4 four = *(const float4*)(column + row);
            auto add = [&](const float* own_row, int stride) {
                explained += four.x * own_row[0];
                if (row + 1 < step) explained += four.y * own_row[stride];
                if (row + 2 < step) explained += four.z * own_row[2 * stride];
                if (row + 3 < step) explained += four.w * own_row[3 * stride];
            };
            // Two calls, so that the first one is compiled for shared memory.
            if (row < resident) add(factors + row * width + local, width);
            else add(spill + (i64)(row - resident) * n + token, n);
        }
        partial[thread] = explained;
        __syncthreads();
        if (group == 0 && mine) {
            explained = 0.0f;
            for (int other = 0; other < groups; ++other) explained += partial[other * columns + local];
            // A pick inside the span of earlier ones explains nothing new; dividing by its noise would. Not NaN.
            float pivot = __uint_as_float((u32)(best >> 32) & 0x7fffffffu);
            float factor = 0.0f;
            if (pivot > own_r * own_r * 1.1920929e-7f)
                factor = (own_r * r * (product * (scale * own)) - explained) / sqrtf(pivot);
            if (step < resident) factors[step * width + local] = factor;
            else spill[(i64)(step - resident) * n + token] = factor;
            residual = fmaxf(residual - factor * factor, 0.0f);
            if (token == pick) open = false;
        }
    }
#endif
}
