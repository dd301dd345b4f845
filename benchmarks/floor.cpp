// The arithmetic of the scan in registers and a few KiB of the first-level cache: lower bounds for the time of a kernel on
// this machine.
//
// vmrnn_floor       the states alone. A step of one vector of channels and one state is an exp2 and the multiply-adds of
//                   states_forward in cpu.cpp, or of states_forward and states_backward.
// vmrnn_full_floor  with what every step of a vector of channels needs besides: projection and softplus of the step size,
//                   D x, and in the backward their gradients and the sums over channels. Maps and states are neither read
//                   nor written in memory, and nothing is copied.

#include "../vmrnn/scan/cpu.cpp"

namespace {

constexpr i64 S = LANES == 16 ? 8 : 4;  // vectors of states in registers: 32 registers, or 16

template <bool both>
vec steps(i64 n, const vec* table) {
  vec h[S], A_[S], dh[S]{}, dA[S]{}, y{}, from_a{}, from_b{}, db{}, dc{};
  for (i64 i = 0; i < S; i++) h[i] = table[i], A_[i] = -table[i];
  for (i64 l = 0; l < n; l++) {
    const vec *row = table + l % 64, dt = row[0], dtx = row[1], b = row[2], c = row[3], dy = row[4];
    for (i64 i = 0; i < S; i++) {
      const vec a = exp2v(dt * A_[i]);
      if (both) {
        const vec g = c * dy + dh[i], decayed = a * h[i], g_decayed = g * decayed;
        h[i] = decayed + dtx * b;
        db += g * dtx;
        dc += dy * (dtx * b + decayed);
        dA[i] += g_decayed * dt;
        from_a += g_decayed * A_[i];
        from_b += g * b;
        dh[i] = a * g;
      } else {
        h[i] = a * h[i] + dtx * b;
        y += h[i] * c;
      }
    }
  }
  for (i64 i = 0; i < S; i++) y += h[i] + dh[i] + dA[i];
  return y + from_a + from_b + db + dc;
}

// n steps of a block without its states. Four steps share the loads of the weight, as in cpu.cpp. Every sum has several
// accumulators, so that none waits for the one before it.
template <bool both>
vec around(i64 n, i64 R, i64 states, const vec* table) {
  vec y[4][U]{}, dx[4][U]{}, dbias[4][U]{}, dD[4][U]{}, dlow[4][U]{}, dweight[4][U]{};
  sums folded[4]{};
  const float* low = (const float*)table;
  for (i64 l = 0; l < n; l += 4) {
    vec dt[4][U], slope[4][U], from_a[4][U];
    for (i64 i = 0; i < 4; i++)
      for (i64 u = 0; u < U; u++) dt[i][u] = table[u];
    for (i64 r = 0; r < R; r++)
      for (i64 i = 0; i < 4; i++)
        for (i64 u = 0; u < U; u++) dt[i][u] += table[r % 32 + u] * low[i * R + r];
    for (i64 i = 0; i < 4; i++)
      for (i64 u = 0; u < U; u++) {
        dt[i][u] = softplus(dt[i][u], both ? &slope[i][u] : nullptr);
        const vec x = table[l % 32 + i], D = table[u], dy = table[l % 32 + i + 1], from_b = table[l % 32 + i + 2];
        y[i][u] += dt[i][u] * x + D * x;
        if (both) {
          dx[i][u] += dt[i][u] * from_b + D * dy;
          dD[i][u] += dy * x;
          from_a[i][u] = (LN2 * from_b + x * from_b) * slope[i][u];
          dbias[i][u] += from_a[i][u];
        }
      }
    if (!both) continue;
    // The gradient of the low-rank step size: R sums over the channels. It takes R / V vectors for every channel.
    for (i64 r = 0; r < R; r++)
      for (i64 i = 0; i < 4; i++)
        for (i64 u = 0; u < U; u++) dlow[i][u] += table[r % 32 + u] * ((const float*)from_a[i])[r % C];
    // The gradient of the weight
    for (i64 r = 0; r < R; r++)
      for (i64 i = 0; i < 4; i++)
        for (i64 u = 0; u < U; u++) dweight[i][u] += from_a[i][u] * low[i * R + r];
    // The gradients of B and C: sums over the channels of two vectors per state and step.
    for (i64 j = 0; j < 4 * 2 * states / M; j++) {
      vec v[M];
      for (i64 m = 0; m < M; m++) v[m] = table[j % 32 + m];
      folded[j % 4] += fold(v, std::make_index_sequence<V>());
    }
  }
  vec total{};
  for (i64 i = 0; i < 4; i++) {
    for (i64 u = 0; u < U; u++) total += y[i][u] + dx[i][u] + dbias[i][u] + dD[i][u] + dlow[i][u] + dweight[i][u];
    total += folded[i][0];
  }
  return total;
}

std::vector<vec> numbers() { return std::vector<vec>(68, splat(0.01f)); }

}  // namespace

extern "C" {

// `count` steps of one channel and one state, forward, or (both) recomputed and backward.
float vmrnn_floor(i64 count, int threads, int both) {
  const auto table = numbers();
  std::vector<float> sink(threads);
  const i64 n = count / (S * V) / threads;
  const auto kernel = both ? steps<true> : steps<false>;
  run(threads, threads, [&](i64 i) { sink[i] = kernel(n, table.data())[0]; });
  return sink[0];
}

// `count` steps of one channel with all of its states.
float vmrnn_full_floor(i64 count, i64 states, i64 R, int threads, int both) {
  const auto table = numbers();
  std::vector<float> sink(threads);
  const auto kernel = both ? around<true> : around<false>;
  run(threads, threads, [&](i64 i) { sink[i] = kernel(count / C / threads, R, states, table.data())[0]; });
  return sink[0] + vmrnn_floor(count * states, threads, both);
}
}
