// Runs the scan's CPU kernel on the cases of a file and writes its results to another. tests/test_cross.py compiles it for
// other machines and runs it in an emulator.
//
//   cross INPUT OUTPUT THREADS
//
// A case in INPUT: B, H, W, Di, N, R (int64), then x, dbl, dt_weight, dt_bias, A, D and dy (float).
// Its results in OUTPUT: y and the gradients of x, dbl, dt_weight, dt_bias, A and D (float); those of the parameters once
// per batch item.

#include "../vmrnn/scan/cpu.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>

std::vector<float> read(FILE* file, i64 count) {
  std::vector<float> values(count);
  if (fread(values.data(), sizeof(float), count, file) != size_t(count)) exit(2);
  return values;
}

int main(int, char** arguments) {
  FILE* input = fopen(arguments[1], "rb");
  FILE* output = fopen(arguments[2], "wb");
  const int threads = atoi(arguments[3]);
  i64 sizes[6];
  while (fread(sizes, sizeof(i64), 6, input) == 6) {
    const i64 B = sizes[0], H = sizes[1], W = sizes[2], Di = sizes[3], N = sizes[4], R = sizes[5];
    const i64 map = B * H * W * Di, rows = B * H * W * K * (R + 2 * N);
    const i64 counts[4] = {K * Di * R, K * Di, K * Di * N, K * Di};
    const auto x = read(input, map), dbl = read(input, rows);
    std::vector<std::vector<float>> parameters, gradients;
    for (i64 count : counts) {
      parameters.push_back(read(input, count));
      gradients.emplace_back(B * count, NAN);
    }
    const auto dy = read(input, map);
    const Problem p{x.data(), dbl.data(), parameters[0].data(), parameters[1].data(), parameters[2].data(),
                    parameters[3].data(), B, H, W, Di, N, R};
    const i64 ranges = std::min<i64>(p.blocks(), 2);
    std::vector<float> y(map, NAN), dx(map, NAN), ddbl(rows, NAN), partial(ranges * rows, NAN);
    std::vector<float> checkpoints(B * p.blocks() * K * p.chunks() * p.states() * C, NAN);
    const Gradients out{dx.data(), ddbl.data(), gradients[0].data(), gradients[1].data(), gradients[2].data(),
                        gradients[3].data(), partial.data()};
    vmrnn_scan_forward(&p, threads, y.data(), checkpoints.data());
    vmrnn_scan_backward(&p, threads, ranges, dy.data(), checkpoints.data(), &out);
    for (const auto* values : {&y, &dx, &ddbl, &gradients[0], &gradients[1], &gradients[2], &gradients[3]})
      if (fwrite(values->data(), sizeof(float), values->size(), output) != values->size()) exit(3);
  }
  printf("lanes %d, channels %d, OpenMP %d\n", int(V), vmrnn_scan_channels(), vmrnn_scan_openmp());
  return fclose(output);
}
