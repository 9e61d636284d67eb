// Float32 products by bfloat16 ones on AMX (optim/engines/amx.py): every factor is the sum of two bfloat16 numbers, and
// of the four products the three that matter are summed in float32 (Henry, Tang, Heinecke: "Leveraging the bfloat16
// Artificial Intelligence Datatype For Higher-Precision Computations", 2019; oneMKL calls it float_to_bf16x2).
//
// A tile is 16 rows of 64 bytes. Both factors lie as blocks of two tiles, the high parts and then the low ones: of
// x 16 rows by 32 columns, of the weight 32 by 16, with pairs of rows side by side as the instruction wants them.

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

namespace {

constexpr int64_t kTile = 1024, kBlock = 2 * kTile;
constexpr int64_t kEdge = 16, kDepth = 32;
// Of so many rows at a time the parts are kept: they and a panel of the weight shall fit into the second cache.
constexpr int64_t kRows = 128;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Memory that a thread keeps for the parts of x.
struct Scratch {
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
  int64_t size = 0;

  char* take(int64_t wanted) {
    if (wanted > size) {
      memory.reset(static_cast<char*>(std::aligned_alloc(64, wanted)));
      size = memory ? wanted : 0;
      if (!memory) throw std::bad_alloc();
    }
    return memory.get();
  }
};

int64_t blocks(int64_t size, int64_t edge) { return (size + edge - 1) / edge; }

__mmask16 first(int64_t count) { return count >= 16 ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1; }

// Split 16 numbers. Of infinity the low part is no number, and neither is any product with it.
void split16(__m512 x, __m256i* high, __m256i* low) {
  __m256i top = (__m256i)_mm512_cvtneps_pbh(x);
  __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(top), 16));
  _mm256_storeu_si256(high, top);
  _mm256_storeu_si256(low, (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(x, wide)));
}

// Split up to 32 numbers of a row; what is missing is 0.
void split_row(const float* x, int64_t count, char* high, char* low) {
  for (int half = 0; half < 2; half++, x += 16, count -= 16, high += 32, low += 32)
    split16(_mm512_maskz_loadu_ps(first(count), x), (__m256i*)high, (__m256i*)low);
}

// Add the bias to a tile of results, and put what is of them into the output.
void put(const float* tile, const float* bias, float* out, int64_t columns, int64_t rows, int64_t wide) {
  __mmask16 mask = first(wide);
  __m512 shift = bias ? _mm512_maskz_loadu_ps(mask, bias) : _mm512_setzero_ps();
  for (int64_t row = 0; row < std::min<int64_t>(rows, kEdge); row++)
    _mm512_mask_storeu_ps(out + row * columns, mask, _mm512_add_ps(_mm512_load_ps(tile + row * kEdge), shift));
}

// Multiply one or two blocks of rows by one or two panels of the weight. Tiles 0 to 3 hold the sums, 4 and 5 parts of x, 6
// and 7 of the weight; each part is loaded as seldom as eight tiles allow. `ahead` is the next panels.
template <int R, int C>
void multiply_block(const char* x, int64_t x_next, const char* w, int64_t w_next, int64_t steps, const char* ahead,
                    const float* bias, float* out, int64_t columns, int64_t rows, int64_t wide) {
  _tile_zero(0);
  if (C > 1) _tile_zero(1);
  if (R > 1) _tile_zero(2);
  if (R > 1 && C > 1) _tile_zero(3);
  auto add = [] {
    _tile_dpbf16ps(0, 4, 6);
    if (C > 1) _tile_dpbf16ps(1, 4, 7);
    if (R > 1) _tile_dpbf16ps(2, 5, 6);
    if (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
  };
  auto load_x = [&](int64_t part) {
    _tile_loadd(4, x + part, 64);
    if (R > 1) _tile_loadd(5, x + x_next + part, 64);
  };
  auto load_w = [&](int64_t part) {
    _tile_loadd(6, w + part, 64);
    if (C > 1) _tile_loadd(7, w + w_next + part, 64);
  };
  for (int64_t step = 0; step < steps; step++, x += kBlock, w += kBlock) {
    if (ahead) {  // the processor itself looks no further than a page
      for (int64_t i = 0; i < kBlock; i += 64) {
        _mm_prefetch(ahead + i, _MM_HINT_T1);
        if (C > 1) _mm_prefetch(ahead + w_next + i, _MM_HINT_T1);
      }
      ahead += kBlock;
    }
    load_x(0);
    load_w(kTile);
    add();  // high by low
    load_w(0);
    add();  // high by high
    load_x(kTile);
    add();  // low by high
  }
  alignas(64) float tile[kEdge * kEdge];
  _tile_stored(0, tile, 64);
  put(tile, bias, out, columns, rows, wide);
  if (C > 1) {
    _tile_stored(1, tile, 64);
    put(tile, bias ? bias + kEdge : nullptr, out + kEdge, columns, rows, wide - kEdge);
  }
  if (R > 1) {
    _tile_stored(2, tile, 64);
    put(tile, bias, out + kEdge * columns, columns, rows - kEdge, wide);
  }
  if (R > 1 && C > 1) {
    _tile_stored(3, tile, 64);
    put(tile, bias ? bias + kEdge : nullptr, out + kEdge * columns + kEdge, columns, rows - kEdge, wide - kEdge);
  }
}

}  // namespace

// The bytes that `pack` fills for a weight [columns, depth].
extern "C" int64_t packed_size(int64_t columns, int64_t depth) {
  return blocks(columns, kEdge) * blocks(depth, kDepth) * kBlock;
}

// Lay out a weight [columns, depth]; `out` is zeros.
extern "C" void pack(const float* weight, int64_t columns, int64_t depth, char* out) {
  alignas(64) uint16_t parts[2][kDepth];
  int64_t steps = blocks(depth, kDepth);
  for (int64_t column = 0; column < columns; column++)
    for (int64_t step = 0; step < steps; step++) {
      const float* from = weight + column * depth + step * kDepth;
      split_row(from, depth - step * kDepth, (char*)parts[0], (char*)parts[1]);
      auto block = (uint16_t*)(out + (column / kEdge * steps + step) * kBlock);
      for (int part = 0; part < 2; part++)
        for (int64_t k = 0; k < kDepth; k++)
          block[part * (kTile / 2) + k / 2 * kDepth + column % kEdge * 2 + k % 2] = parts[part][k];
    }
}

namespace {

// x [rows, depth] by a packed weight and plus the bias, which may be null -> out [rows, columns]. Any number of threads may
// call it.
void multiply(const float* x, int64_t rows, const char* weight, const float* bias, float* out, int64_t columns,
              int64_t depth, int threads) {
  static thread_local Scratch scratch;
  int64_t steps = blocks(depth, kDepth), panel = steps * kBlock, panels = blocks(columns, kEdge);
  char* parts = scratch.take(blocks(std::min(rows, kRows), kEdge) * panel);
#pragma omp parallel num_threads(threads)
  {
    TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t top = 0; top < rows; top += kRows) {
      int64_t some = std::min(rows - top, kRows), strips = blocks(some, kEdge);
#pragma omp for
      for (int64_t row = 0; row < strips * kEdge; row++)
        for (int64_t step = 0; step < steps; step++) {
          char* block = parts + row / kEdge * panel + step * kBlock + row % kEdge * 64;
          int64_t left = row < some ? depth - step * kDepth : 0;
          split_row(x + (top + row) * depth + step * kDepth, left, block, block + kTile);
        }
#pragma omp for collapse(2)
      for (int64_t p = 0; p < panels; p += 2)
        for (int64_t s = 0; s < strips; s += 2) {
          const char *a = parts + s * panel, *b = weight + p * panel;
          const char* ahead = s == 0 && p + 3 < panels ? b + 2 * panel : nullptr;
          const float* shift = bias ? bias + p * kEdge : nullptr;
          float* to = out + (top + s * kEdge) * columns + p * kEdge;
          int64_t high = some - s * kEdge, wide = columns - p * kEdge;
          auto run = s + 1 < strips ? (p + 1 < panels ? multiply_block<2, 2> : multiply_block<2, 1>)
                                    : (p + 1 < panels ? multiply_block<1, 2> : multiply_block<1, 1>);
          run(a, panel, b, panel, steps, ahead, shift, to, columns, high, wide);
        }
    }
    _tile_release();
  }
}

// What this needs of torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h, whose functions stay as they are).
struct Torch {
  int32_t (*get_data_ptr)(void* tensor, void** found);
  int32_t (*get_dim)(void* tensor, int64_t* found);
  int32_t (*get_sizes)(void* tensor, int64_t** found);
  int32_t (*get_strides)(void* tensor, int64_t** found);
  int32_t (*get_dtype)(void* tensor, int32_t* found);
  int32_t (*empty_strided)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                           int32_t device_index, void** made);
  int32_t (*delete_tensor_object)(void* tensor);
};

Torch torch;

void check(int32_t error) {
  if (error) throw std::runtime_error("split_linear: torch's C interface reports an error");
}

// A tensor's handle, deleted at the end.
struct Tensor {
  void* handle;

  explicit Tensor(uint64_t handle) : handle(reinterpret_cast<void*>(handle)) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle) torch.delete_tensor_object(handle);
  }

  void* release() { return std::exchange(handle, nullptr); }

  template <typename T>
  T* data() const {
    void* found;
    check(torch.get_data_ptr(handle, &found));
    return static_cast<T*>(found);
  }
};

}  // namespace

extern "C" void use(const Torch* functions) { torch = *functions; }

// pt2_optim::split_linear(Tensor x, Tensor packed, Tensor bias, int columns, int threads) -> Tensor, as torch calls
// operators of C: the handles of arguments are ours to delete, that of the result is the caller's.
extern "C" void split_linear(uint64_t* stack, uint64_t, uint64_t) {
  constexpr int32_t kCpu = 0, kFloat32 = 6;  // c10::DeviceType, c10::ScalarType
  constexpr int64_t kMostDims = 16;
  Tensor x(stack[0]), packed(stack[1]), bias(stack[2]);
  int64_t columns = static_cast<int64_t>(stack[3]), dims, *sizes, *strides, rows = 1;
  check(torch.get_dim(x.handle, &dims));
  check(torch.get_sizes(x.handle, &sizes));
  check(torch.get_strides(x.handle, &strides));
  int32_t dtype;
  check(torch.get_dtype(x.handle, &dtype));
  if (dtype != kFloat32) throw std::runtime_error("split_linear: x is not of float32");
  if (dims < 1 || dims > kMostDims) throw std::runtime_error("split_linear: x has 1 to 16 dimensions");
  int64_t made_sizes[kMostDims], made_strides[kMostDims], depth = sizes[dims - 1], expected = depth;
  made_sizes[dims - 1] = columns;
  made_strides[dims - 1] = 1;
  bool dense = depth < 2 || strides[dims - 1] == 1;
  for (int64_t dim = dims - 2; dim >= 0; dim--) {
    dense = dense && (sizes[dim] == 1 || strides[dim] == expected);
    made_strides[dim] = columns * rows;
    rows *= made_sizes[dim] = sizes[dim];
    expected *= sizes[dim];
  }
  if (rows && !dense) throw std::runtime_error("split_linear: x is not contiguous");
  void* made;
  check(torch.empty_strided(dims, made_sizes, made_strides, kFloat32, kCpu, 0, &made));
  Tensor result(reinterpret_cast<uint64_t>(made));
  int64_t dims_of_bias;
  int64_t* size_of_bias;
  check(torch.get_dim(bias.handle, &dims_of_bias));
  check(torch.get_sizes(bias.handle, &size_of_bias));
  const float* shift = dims_of_bias == 1 && size_of_bias[0] == columns ? bias.data<float>() : nullptr;
  multiply(x.data<float>(), rows, packed.data<char>(), shift, result.data<float>(), columns, depth,
           static_cast<int>(stack[4]));
  stack[0] = reinterpret_cast<uint64_t>(result.release());
}
