// Tensors of the LibTorch stable ABI by storage type, and new ones.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <vector>

#include "cpu_vectors.h"

namespace dssp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <typename Scalar>
using Sum = typename Lanes<Scalar>::Sum;
template <typename Scalar>
using Vector = typename Lanes<Scalar>::Vector;

// A vector that starts at a cache line: loads of whole vectors never straddle two.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* data, size_t) { ::operator delete(data, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <typename T>
using Buffer = std::vector<T, LineAllocator<T>>;

// As large, but with nothing in it yet: for what every thread fills for itself.
template <typename T>
struct UnsetAllocator : LineAllocator<T> {
  template <typename Other>
  struct rebind {
    using other = UnsetAllocator<Other>;
  };
  template <typename Element>
  void construct(Element* at) {
    ::new (static_cast<void*>(at)) Element;
  }
};
template <typename T>
using UnsetBuffer = std::vector<T, UnsetAllocator<T>>;

template <typename Use>
void with_storage(ScalarType type, Use use) {
  switch (type) {
    case ScalarType::Float: return use(float{});
    case ScalarType::Double: return use(double{});
    case ScalarType::BFloat16: return use(BFloat16{});
    case ScalarType::Half: return use(Half{});
    default: STD_TORCH_CHECK(false, "expected a floating-point tensor");
  }
}

inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline Tensor empty_strided(Sizes sizes, Sizes strides, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_as(const Tensor& like) { return empty_strided(like.sizes(), like.strides(), dtype_of(like)); }

inline Tensor empty_vector(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return empty_strided({&size, 1}, {&stride, 1}, dtype);
}

inline Tensor no_elements(const Tensor& like) { return empty_vector(0, dtype_of(like)); }

// The dtype of sums of a storage type.
template <typename Scalar>
int32_t dtype_of_sums() {
  return std::is_same_v<Scalar, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

}  // namespace dssp
