// The device type "pretended", which uses the CPU's memory and computes every operator on the CPU. It refuses to mix
// its tensors with the CPU's, as a GPU does. It counts the operators that it runs and how often it is waited for. It is
// added as PyTorch recommends: https://pytorch.org/docs/stable/accelerator/index.html

#include <torch/extension.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <deque>
#include <set>

using namespace at;

namespace {

const Device here(DeviceType::PrivateUse1, 0);
std::atomic<int64_t> operators{0}, waits{0};
thread_local bool on_cpu = false;  // set while an operator is computed, whose own copies do not count

struct Memory final : Allocator {
  DataPtr allocate(size_t size) override {
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    return {data, data, &free, here};
  }
  static void free(void* data) {
    if (data) c10::free_cpu(data);
  }
  DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
Memory memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &memory);

// One device with one stream, which is synchronous.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device) const override { return here; }
  Device getDevice() const override { return here; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, here); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, here); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return Stream(Stream::DEFAULT, here); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Draws : CPUGeneratorImpl {
  Draws() : CPUGeneratorImpl(c10::detail::getNonDeterministicRandom()) {
    device_ = here;
    key_set_ = DispatchKeySet(DispatchKey::PrivateUse1);
  }
};

struct Hooks final : PrivateUse1HooksInterface {
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const { return true; }  // no override: PyTorch 2.6 does not ask
  bool isAvailable() const { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<Draws>(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static const Generator generator = make_generator<Draws>();
    return generator;
  }
  void resizePrivateUse1Bytes(const Storage& storage, size_t size) const override {
    auto data = memory.allocate(size);
    if (storage.nbytes()) memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, DispatchKeySet(DispatchKey::PrivateUse1), dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, DispatchKeySet(DispatchKey::PrivateUse1), dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, offset);
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef size, std::optional<MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor view(const Tensor& self, SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor& set_storage(Tensor& self, Storage storage) { return at::native::set_(self, storage); }

Tensor& set_part(Tensor& self, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::set_(self, storage, offset, size, stride);
}

Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }

// The same memory as a CPU tensor.
Tensor seen_by_cpu(const Tensor& t) {
  return t.is_cpu() ? t : from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(kCPU));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (!on_cpu) {
    operators++;
    if (to.is_cpu() && !non_blocking) waits++;
  }
  const NoGradGuard no_grad;
  Tensor target = seen_by_cpu(to);
  at::native::copy_(target, seen_by_cpu(from), non_blocking);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

Scalar item(const Tensor& self) {
  if (!on_cpu) waits++;
  return at::native::_local_scalar_dense_cpu(self);
}

// Operators whose output's size depends on values, or that return a value to the CPU. A GPU synchronizes for them.
const std::set<std::string> asking{"aten::nonzero",       "aten::equal",   "aten::is_nonzero",
                                   "aten::masked_select", "aten::_unique2", "aten::unique_dim",
                                   "aten::bincount",      "aten::_linalg_eigh"};

// A CPU generator for one operator. It takes the state of the device's generator and gives it back at the end.
struct Borrowed {
  Generator ours, cpu = at::detail::createCPUGenerator();
  explicit Borrowed(const Generator& generator) : ours(generator) { cpu.set_state(ours.get_state()); }
  ~Borrowed() { ours.set_state(cpu.get_state()); }
};

void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  operators++;
  waits += asking.count(name);
  const auto check = [&](const Tensor& t) {
    TORCH_CHECK(
        !t.defined() || !t.is_cpu() || t.dim() == 0,
        "Expected all tensors to be on the same device, but found ", here, " and cpu (", name, ")");
  };
  std::deque<Borrowed> generators;
  const auto count = op.schema().arguments().size();
  for (size_t i = stack->size() - count; i < stack->size(); i++) {
    auto& argument = (*stack)[i];
    if (argument.isTensor()) check(argument.toTensor());
    // A list of optional tensors holds indices, which may be on the CPU, as for a GPU. So it is not checked.
    if (argument.isTensorList())
      for (const auto& t : argument.toTensorVector()) check(t);
    if (argument.isGenerator()) {
      TORCH_CHECK(argument.toGenerator().device() == here, "Expected a generator of ", here, ", but found the CPU's");
      argument = generators.emplace_back(argument.toGenerator()).cpu;
    }
  }
  struct During {
    bool before = std::exchange(on_cpu, true);
    ~During() { on_cpu = before; }
  } during;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("resize_", resize_);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register", [] {
    static Hooks hooks;
    RegisterPrivateUse1HooksInterface(&hooks);
  });
  m.def("operators", [] { return operators.load(); });
  m.def("waits", [] { return waits.load(); });
}
