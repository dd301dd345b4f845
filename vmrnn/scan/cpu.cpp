// The selective scan of vmrnn/scan/reference.py on a CPU: four directions, forward and backward, fp32.
//
// Vectors run across channels. So the state needs no sums within a vector, and B and C are broadcast scalars. One map is
// walked in four orders; nothing is permuted. A task owns one batch item and a range of channels and goes through the four
// directions, so y and dx need no locks. What is summed over channels (the gradient of dbl) or over the batch (gradients of
// the parameters) is written once per task and added in a fixed order. The tasks do not depend on the number of threads.
// Step sizes are made from their low rank, T positions at a time, and never stored. The backward starts every T positions
// from a checkpoint of the forward. It keeps exp(dt A) and h of that chunk, for G states at a time, in the first-level
// cache. Nothing is kept between calls.
//
// Letters as in reference.py. Channels and states are padded with zeros, which add nothing.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define LANES 16
#define VECS 2  // vectors of channels computed together: halves the cost of the sums over channels
#elif defined(__AVX2__)
#define LANES 8
#define VECS 2  // does not fit into 16 registers, and is faster all the same
#else
#define LANES 4
#define VECS 1
#endif

namespace {

using i64 = int64_t;  // long has 32 bits on Windows

constexpr i64 V = LANES, U = VECS, C = U * V;  // a block is C channels
constexpr i64 G = 4;    // states computed together
constexpr i64 K = 4;    // directions
constexpr i64 T = 64;   // positions in a chunk
constexpr i64 SHARE = 32 / C;  // blocks in a task of the forward, which share the copied rows of dbl
typedef float vec __attribute__((vector_size(V * 4)));
typedef int32_t ivec __attribute__((vector_size(V * 4)));

constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

inline vec splat(float s) { return s - vec{}; }

// 2^x for x <= 0, with x = n + f, |f| <= 1/2. The polynomial gives 2^f to 9e-8, and exactly 1 at f = 0. NaN stays NaN.
inline vec exp2v(vec x) {
#if LANES == 16
  vec f = _mm512_reduce_ps(x, 0), n = x - f;
#else
  // Of two operands, max returns the second if one is NaN.
#if defined(__AVX2__)
  x = _mm256_max_ps(splat(-127.f), x);
#elif defined(__SSE2__)
  x = _mm_max_ps(splat(-127.f), x);
#else
  x = x < -127.f ? splat(-127.f) : x;
#endif
  // The result is scaled by a product, not by adding to its exponent: this keeps NaN, whatever its bits.
  const float round = 12582912.f + 127.f;  // 1.5 * 2^23: the sum's low bits are n + 127
  vec t = x + round, f = x - (t - round);
#endif
  vec p = splat(1.326472731307149e-3f);
  p = p * f + 9.671512991189957e-3f;
  p = p * f + 5.550733581185341e-2f;
  p = p * f + 2.4022242426872253e-1f;
  p = p * f + 6.931470036506653e-1f;
  p = p * f + 1.f;
#if LANES == 16
  return _mm512_scalef_ps(p, n);
#else
  return p * (vec)((ivec)t << 23);
#endif
}

// softplus, with a small relative error for every x. Its derivative likewise, unless the pointer is null.
inline vec softplus(vec x, vec* derivative) {
  const vec z = exp2v((x < 0.f ? x : -x) * LOG2E);  // e^-|x|
  vec s;  // z / (2 + z)
  if (derivative) {  // one division for both
    const vec inverse = 1.f / ((1.f + z) * (2.f + z));
    *derivative = (x < 0.f ? z : splat(1.f)) * (2.f + z) * inverse;
    s = z * (1.f + z) * inverse;
  } else {
    s = z / (2.f + z);
  }
  const vec q = s * s;  // log(1 + z) = 2 artanh(s)
  vec p = splat(2.801198958900e-1f);
  p = p * q + 2.800180315971e-1f;
  p = p * q + 4.002152681350e-1f;
  p = p * q + 6.666641831398e-1f;
  p = p * q + 2.f;
  return (x < 0.f ? vec{} : x) + p * s;
}

// `lanes` floats, `stride` apart. Further lanes are zero when loaded, and are not stored.
inline vec gather(const float* p, i64 lanes, i64 stride) {
  vec v{};
  for (i64 i = 0; i < std::min(lanes, V); i++) v[i] = p[i * stride];
  return v;
}
inline void scatter(float* p, vec v, i64 lanes, i64 stride) {
  for (i64 i = 0; i < std::min(lanes, V); i++) p[i * stride] = v[i];
}
inline vec load(const float* p, i64 lanes) {
  if (lanes < V) return gather(p, lanes, 1);
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v, i64 lanes) {
  if (lanes < V) return scatter(p, v, lanes, 1);
  std::memcpy(p, &v, sizeof v);
}
// Copies a group of states to or from registers. memcpy would leave them in memory.
inline void copy(vec* to, const vec* from) {
  for (i64 i = 0; i < G * U; i++) to[i] = from[i];
}

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

// One level of a sum over lanes. Lanes with bit `b` clear keep the partial sums of a, the others those of c.
template <int b, size_t... i>
inline vec fold(vec a, vec c, std::index_sequence<i...>) {
  return SHUFFLE(a, c, (i & b ? int(V + i) : int(i))...) + SHUFFLE(a, c, (i & b ? int(V + (i ^ b)) : int(i ^ b))...);
}
// The sums over the lanes of M vectors, in order. Overwrites v.
constexpr i64 M = V < 2 * G ? V : 2 * G;
typedef float sums __attribute__((vector_size(M * 4)));
template <int m = M, int b = V / 2, size_t... i>
inline sums fold(vec* v, std::index_sequence<i...> lanes) {
  for (int j = 0; j < m / 2; j++) v[j] = fold<b>(v[j], v[j + m / 2], lanes);
  if constexpr (m == 1 && b > 0) v[0] = fold<b>(v[0], v[0], lanes);
  if constexpr (b > 0) return fold<(m > 1 ? m / 2 : 1), b / 2>(v, lanes);
  const vec packed = SHUFFLE(v[0], v[0], int(i * (V / M) % V)...);
  sums s;
  std::memcpy(&s, &packed, sizeof s);
  return s;
}

struct Problem {
  const float *x, *dbl, *weight, *bias, *A, *D;
  i64 B, H, W, Di, N, R;

  i64 L() const { return H * W; }
  i64 row() const { return R + 2 * N; }
  i64 chunks() const { return (L() + T - 1) / T; }
  i64 blocks() const { return (Di + C - 1) / C; }
  i64 states() const { return (N + G - 1) / G * G; }         // padded to groups
  i64 low_vectors() const { return (R + V - 1) / V; }        // vectors per low-rank step size
  // The position in the map, row-major, of step i in direction k.
  i64 position(i64 k, i64 i) const {
    if (k >= 2) i = L() - 1 - i;
    return k % 2 ? i % H * W + i / H : i;
  }
  i64 channel_of(i64 batch, i64 position) const { return (batch * L() + position) * Di; }
};

// The gradients. Those of the parameters have one row per batch item. `partial` is the gradient of dbl, once per range of
// channels: (ranges, B, K, L, R + 2N), in scan order.
struct Gradients {
  float *x, *dbl, *weight, *bias, *A, *D, *partial;
  float* rows(const Problem& p, i64 range, i64 batch, i64 k, i64 i) const {
    return partial + (((range * p.B + batch) * K + k) * p.L() + i) * p.row();
  }
};

// T steps of one direction, and what a block of channels holds for them.
struct Chunk {
  const Problem& p;
  const i64 width, groups;
  i64 n = 0, at[T];          // number of steps, and the offset of each in a (B, L, Di) array
  std::vector<float> rows;    // [T][width], rows of dbl: low-rank step size, B and C with padded states
  std::vector<sums> dbc;      // [T][groups][dB of G, dC of G], summed over the blocks of a task
  std::vector<vec> dlow;      // [T][low_vectors]
  vec x[T][U], dt[T][U], dtx[T][U], slope[T][U];  // slope: derivative of softplus
  vec y[T][U];                                    // in the backward dy
  vec from_a[T][U], from_b[T][U];                 // gradients through exp(dt A) / log(2) and dt x B
  vec a[T][G * U], before[T][G * U];              // exp(dt A), and h before the step

  explicit Chunk(const Problem& p)
      : p(p), width(p.R + 2 * p.states()), groups(p.states() / G), rows(T * width),
        dbc(T * groups * 2 * G / M), dlow(T * p.low_vectors()) {}

  const float* low(i64 l) const { return &rows[l * width]; }
  const float* b(i64 l, i64 state) const { return low(l) + p.R + state; }
  const float* c(i64 l, i64 state) const { return b(l, state) + p.states(); }

  void start(i64 batch, i64 k, i64 first) {
    n = std::min(T, p.L() - first);
    for (i64 l = 0; l < n; l++) {
      const i64 position = p.position(k, first + l);
      at[l] = p.channel_of(batch, position);
      const float* from = p.dbl + ((batch * p.L() + position) * K + k) * p.row();
      float* to = &rows[l * width];
      if (p.N == p.states()) {
        std::memcpy(to, from, width * 4);
      } else {
        std::memcpy(to, from, (p.R + p.N) * 4);
        std::memcpy(to + p.R + p.states(), from + p.R + p.N, p.N * 4);
      }
    }
  }

  void store_rows(float* to) const {
    for (i64 l = 0; l < n; l++, to += p.row()) {
      std::memcpy(to, &dlow[l * p.low_vectors()], p.R * 4);
      const float* from = (const float*)&dbc[l * groups * 2 * G / M];
      i64 s = 0;
      for (; s + G <= p.N; s += G, from += 2 * G) {  // whole groups: copies of a constant size
        std::memcpy(to + p.R + s, from, G * 4);
        std::memcpy(to + p.R + p.N + s, from + G, G * 4);
      }
      for (i64 j = 0; s < p.N; s++, j++) to[p.R + s] = from[j], to[p.R + p.N + s] = from[G + j];
    }
  }
};

// C channels of one direction: parameters, state and gradients, as vectors over channels.
struct Block {
  const Problem& p;
  i64 k = 0, channel = 0;
  std::vector<vec> A, weight, h;               // [states][U], [R][U], [states][U]
  std::vector<vec> dA, dweight, dh;            // dh: from the steps after the chunk
  std::vector<vec> weight_rows;                // [C][low_vectors]
  vec bias[U]{}, D[U]{}, dbias[U]{}, dD[U]{};

  explicit Block(const Problem& p)
      : p(p), A(p.states() * U), weight(p.R * U), h(A.size()), dA(A.size()), dweight((p.R + 3) * U), dh(A.size()),
        weight_rows(C * p.low_vectors()) {}

  i64 lanes(i64 u) const { return p.Di - channel - u * V; }

  void start(i64 direction, i64 first) {
    k = direction, channel = first;
    for (auto* v : {&h, &dA, &dweight, &dh}) std::fill(v->begin(), v->end(), vec{});
    for (i64 u = 0; u < U; u++) {
      const i64 at = k * p.Di + channel + u * V;
      // In units of log(2), so that the decay of a step is 2^(dt A).
      for (i64 s = 0; s < p.N; s++) A[s * U + u] = gather(p.A + at * p.N + s, lanes(u), p.N) * LOG2E;
      for (i64 r = 0; r < p.R; r++) weight[r * U + u] = gather(p.weight + at * p.R + r, lanes(u), p.R);
      bias[u] = load(p.bias + at, lanes(u)), D[u] = load(p.D + at, lanes(u));
      dbias[u] = dD[u] = vec{};
    }
    for (i64 i = 0; i < std::min(C, p.Di - channel); i++)
      std::memcpy(&weight_rows[i * p.low_vectors()], p.weight + (k * p.Di + channel + i) * p.R, p.R * 4);
  }

  // The address of h at the start of a chunk.
  float* checkpoint(float* base, i64 batch, i64 chunk) const {
    return base + (((batch * p.blocks() + channel / C) * K + k) * p.chunks() + chunk) * p.states() * C;
  }

  // out = v in the first direction, += v in the others.
  void merge(float* out, i64 u, vec v) const {
    store(out + channel + u * V, k ? v + load(out + channel + u * V, lanes(u)) : v, lanes(u));
  }

  // x, dt and dt x, and for the backward the slope. Four steps share the loads of the weight.
  template <bool slope>
  void step_sizes(Chunk& t) const {
    for (i64 l = 0; l < t.n; l += 4) {
      vec sum[4][U];
      for (i64 i = 0; i < 4; i++)
        for (i64 u = 0; u < U; u++) sum[i][u] = bias[u];
      for (i64 r = 0; r < p.R; r++)
        for (i64 i = 0; i < 4; i++)
          for (i64 u = 0; u < U; u++) sum[i][u] += weight[r * U + u] * t.low(l + i)[r];
      for (i64 i = 0; i < 4; i++)
        for (i64 u = 0; u < U; u++) t.dt[l + i][u] = softplus(sum[i][u], slope ? &t.slope[l + i][u] : nullptr);
    }
    for (i64 l = 0; l < t.n; l++)
      for (i64 u = 0; u < U; u++) {
        t.x[l][u] = load(p.x + t.at[l] + channel + u * V, lanes(u));
        t.dtx[l][u] = t.dt[l][u] * t.x[l][u];
      }
  }

  // Takes G states through the chunk: adds to t.y, or with `keep` stores what their backward needs.
  template <bool keep>
  void states_forward(Chunk& t, i64 state) {
    vec h_[G * U], A_[G * U];
    copy(h_, &h[state * U]), copy(A_, &A[state * U]);
    for (i64 l = 0; l < t.n; l++) {
      const float *b = t.b(l, state), *c = t.c(l, state);
      for (i64 u = 0; u < U; u++) {
        const vec dt = t.dt[l][u], dtx = t.dtx[l][u];
        vec y{};
        for (i64 j = 0, i = u; j < G; j++, i += U) {
          const vec a = exp2v(dt * A_[i]);
          if (keep) t.a[l][i] = a, t.before[l][i] = h_[i];
          h_[i] = a * h_[i] + dtx * b[j];
          y += h_[i] * c[j];
        }
        if (!keep) t.y[l][u] += y;
      }
    }
    if (!keep) copy(&h[state * U], h_);
  }

  // The backward of states_forward<true>.
  void states_backward(Chunk& t, i64 state) {
    vec dh_[G * U], dA_[G * U], A_[G * U];
    copy(dh_, &dh[state * U]), copy(dA_, &dA[state * U]), copy(A_, &A[state * U]);
    for (i64 l = t.n - 1; l >= 0; l--) {
      const float *b = t.b(l, state), *c = t.c(l, state);
      vec db_dc[2 * G]{}, from_a[U]{}, from_b[U]{};
      for (i64 j = 0; j < G; j++)
        for (i64 u = 0, i = j * U; u < U; u++, i++) {
          const vec dy = t.y[l][u], dtx = t.dtx[l][u], a = t.a[l][i];
          const vec g = c[j] * dy + dh_[i];
          const vec decayed = a * t.before[l][i], g_decayed = g * decayed;
          db_dc[j] += g * dtx;
          db_dc[G + j] += dy * (dtx * b[j] + decayed);
          dA_[i] += g_decayed * t.dt[l][u];
          from_a[u] += g_decayed * A_[i];
          from_b[u] += g * b[j];
          dh_[i] = a * g;
        }
      for (i64 u = 0; u < U; u++) t.from_a[l][u] += from_a[u], t.from_b[l][u] += from_b[u];
      for (i64 i = 0; i < 2 * G / M; i++)
        t.dbc[(l * t.groups + state / G) * 2 * G / M + i] += fold(db_dc + i * M, std::make_index_sequence<V>());
    }
    copy(&dh[state * U], dh_), copy(&dA[state * U], dA_);
  }

  // From the gradients of the steps to the gradients of x, D and the projection.
  void steps_backward(Chunk& t, float* dx) {
    for (i64 l = 0; l < t.n; l++)
      for (i64 u = 0; u < U; u++) {
        const vec dy = t.y[l][u], x = t.x[l][u], from_b = t.from_b[l][u];
        merge(dx + t.at[l], u, t.dt[l][u] * from_b + D[u] * dy);
        dD[u] += dy * x;
        t.from_a[l][u] = (LN2 * t.from_a[l][u] + x * from_b) * t.slope[l][u];  // now the gradient of softplus's argument
        dbias[u] += t.from_a[l][u];
      }
    const i64 low_vectors = p.low_vectors();
    for (i64 l = 0; l < t.n; l += 4)
      for (i64 v = 0; v < low_vectors; v++) {
        vec sum[4]{};
        const float* g = (const float*)t.from_a[l];
        for (i64 c = 0; c < C; c++)
          for (i64 i = 0; i < 4; i++) sum[i] += weight_rows[c * low_vectors + v] * g[i * C + c];
        for (i64 i = 0; i < 4; i++) t.dlow[(l + i) * low_vectors + v] += sum[i];
      }
    for (i64 r = 0; r < p.R; r += 4) {
      vec sum[4][U]{};
      for (i64 l = 0; l < t.n; l++)
        for (i64 i = 0; i < 4; i++)
          for (i64 u = 0; u < U; u++) sum[i][u] += t.from_a[l][u] * t.low(l)[r + i];
      for (i64 i = 0; i < 4; i++)
        for (i64 u = 0; u < U; u++) dweight[(r + i) * U + u] += sum[i][u];
    }
  }

  void store_parameters(i64 batch, const Gradients& out) const {
    for (i64 u = 0; u < U; u++) {
      const i64 at = (batch * K + k) * p.Di + channel + u * V;
      for (i64 s = 0; s < p.N; s++) scatter(out.A + at * p.N + s, dA[s * U + u], lanes(u), p.N);
      for (i64 r = 0; r < p.R; r++) scatter(out.weight + at * p.R + r, dweight[r * U + u], lanes(u), p.R);
      store(out.bias + at, dbias[u], lanes(u)), store(out.D + at, dD[u], lanes(u));
    }
  }
};

// One batch item, the blocks [first, last).
void forward(const Problem& p, i64 batch, i64 first, i64 last, float* y, float* checkpoints) {
  Chunk t(p);
  std::vector<Block> blocks(last - first, Block(p));
  for (i64 k = 0; k < K; k++) {
    for (i64 i = first; i < last; i++) blocks[i - first].start(k, i * C);
    for (i64 i = 0; i < p.chunks(); i++) {
      t.start(batch, k, i * T);
      for (Block& block : blocks) {
        block.step_sizes<false>(t);
        if (checkpoints) std::memcpy(block.checkpoint(checkpoints, batch, i), block.h.data(), p.states() * C * 4);
        for (i64 l = 0; l < t.n; l++)
          for (i64 u = 0; u < U; u++) t.y[l][u] = block.D[u] * t.x[l][u];
        for (i64 state = 0; state < p.states(); state += G) block.states_forward<false>(t, state);
        for (i64 l = 0; l < t.n; l++)
          for (i64 u = 0; u < U; u++) block.merge(y + t.at[l], u, t.y[l][u]);
      }
    }
  }
}

// One batch item, the range of blocks [first, last).
void backward(const Problem& p, i64 batch, i64 range, i64 first, i64 last, const float* dy, float* checkpoints,
              const Gradients& out) {
  Chunk t(p);
  std::vector<Block> blocks(last - first, Block(p));
  for (i64 k = 0; k < K; k++) {
    for (i64 i = first; i < last; i++) blocks[i - first].start(k, i * C);
    for (i64 i = p.chunks() - 1; i >= 0; i--) {
      t.start(batch, k, i * T);
      std::fill(t.dbc.begin(), t.dbc.end(), sums{});
      std::fill(t.dlow.begin(), t.dlow.end(), vec{});
      for (Block& block : blocks) {
        block.step_sizes<true>(t);
        std::memcpy(block.h.data(), block.checkpoint(checkpoints, batch, i), p.states() * C * 4);
        for (i64 l = 0; l < T; l++)
          for (i64 u = 0; u < U; u++) {
            t.from_a[l][u] = t.from_b[l][u] = vec{};
            if (l < t.n) t.y[l][u] = load(dy + t.at[l] + block.channel + u * V, block.lanes(u));
          }
        for (i64 state = 0; state < p.states(); state += G) {
          block.states_forward<true>(t, state);
          block.states_backward(t, state);
        }
        block.steps_backward(t, out.x);
      }
      t.store_rows(out.rows(p, range, batch, k, i * T));
    }
    for (const Block& block : blocks) block.store_parameters(batch, out);
  }
}

// The gradient of dbl in one direction: the sum over ranges, in order.
void add_ranges(const Problem& p, i64 ranges, i64 batch, i64 k, const Gradients& out) {
  for (i64 i = 0; i < p.L(); i++) {
    float* to = out.dbl + ((batch * p.L() + p.position(k, i)) * K + k) * p.row();
    std::memcpy(to, out.rows(p, 0, batch, k, i), p.row() * 4);
    for (i64 range = 1; range < ranges; range++) {
      const float* from = out.rows(p, range, batch, k, i);
      for (i64 e = 0; e < p.row(); e++) to[e] += from[e];
    }
  }
}

template <class Task>
void run(i64 tasks, int threads, const Task& task) {
#ifdef _OPENMP
  // One thread enters no parallel region: a process forked after a parallel region could not enter another.
  if (threads > 1 && tasks > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 i = 0; i < tasks; i++) task(i);
    return;
  }
#endif
  for (i64 i = 0; i < tasks; i++) task(i);
}

}  // namespace

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif

extern "C" {

// These decide the shape of the checkpoints: (B, blocks, K, chunks, padded states, C).
EXPORT int vmrnn_scan_channels() { return C; }
EXPORT int vmrnn_scan_steps() { return T; }
EXPORT int vmrnn_scan_group() { return G; }

EXPORT int vmrnn_scan_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// checkpoints: null if no backward follows.
EXPORT void vmrnn_scan_forward(const Problem* p, int threads, float* y, float* checkpoints) {
  const i64 blocks = p->blocks(), tasks = (blocks + SHARE - 1) / SHARE;
  run(p->B * tasks, threads, [&](i64 i) {
    const i64 first = i % tasks * SHARE;
    forward(*p, i / tasks, first, std::min(first + SHARE, blocks), y, checkpoints);
  });
}

EXPORT void vmrnn_scan_backward(const Problem* p, int threads, i64 ranges, const float* dy, float* checkpoints,
                         const Gradients* out) {
  const i64 blocks = p->blocks();
  run(p->B * ranges, threads, [&](i64 i) {
    const i64 range = i % ranges, first = range * blocks / ranges, last = (range + 1) * blocks / ranges;
    backward(*p, i / ranges, range, first, last, dy, checkpoints, *out);
  });
  run(p->B * K, threads, [&](i64 i) { add_ranges(*p, ranges, i / K, i % K, *out); });
}
}
