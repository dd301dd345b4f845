// The arithmetic of the scan in registers: a lower bound for the time of any kernel on this machine.
// A step of one vector of channels and one state is an exp2 and the multiply-adds of states_forward in cpu.cpp, or of
// states_forward and states_backward. There is no softplus, no projection and no sum over channels, and nothing is stored.

#include "../vmrnn/scan/cpu.cpp"

namespace {

template <bool both>
vec steps(i64 n, const vec* table) {
  vec h[G * U], A_[G * U], dh[G * U]{}, dA[G * U]{}, y{}, from_a{}, from_b{}, db{}, dc{};
  for (i64 i = 0; i < G * U; i++) h[i] = table[i], A_[i] = -table[i];
  for (i64 l = 0; l < n; l++) {
    const vec *row = table + l % 64, dt = row[0], dtx = row[1], b = row[2], c = row[3], dy = row[4];
    for (i64 i = 0; i < G * U; i++) {
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
  for (i64 i = 0; i < G * U; i++) y += h[i] + dh[i] + dA[i];
  return y + from_a + from_b + db + dc;
}

}  // namespace

// `count` steps of one channel and one state, forward, or (both) recomputed and backward.
extern "C" float vmrnn_floor(i64 count, int threads, int both) {
  std::vector<vec> table(68, splat(0.01f));
  std::vector<float> sink(threads);
  const i64 n = count / (G * U * V) / threads;
  const auto kernel = both ? steps<true> : steps<false>;
  run(threads, threads, [&](i64 i) { sink[i] = kernel(n, table.data())[0]; });
  return sink[0];
}
