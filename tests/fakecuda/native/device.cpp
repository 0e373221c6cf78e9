// The device: memory, device numbers, streams, and the hooks through which torch asks for CUDA. All of it is host memory,
// and everything has happened when a call returns.
#include "fakecuda.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace fakecuda {
namespace {

constexpr size_t kAlignment = 512;  // bytes, as the caching allocator of CUDA aligns
constexpr size_t kPoisoned = 1 << 22;  // bytes at each end of fresh memory: DeepSpeed's buffers have gigabytes

thread_local c10::DeviceIndex chosen = 0;

c10::DeviceIndex device_count() {
  static const int count = [] {
    const char* text = std::getenv("FAKECUDA_DEVICES");
    return text ? std::atoi(text) : 1;
  }();
  return static_cast<c10::DeviceIndex>(count);
}

void choose(c10::Device device) {
  if (device.has_index()) {
    chosen = device.index();
  }
}

// Writes NaN of every floating type: what has not been written must not be read.
void poison(char* memory, size_t bytes) {
  const size_t ends = std::min(bytes, kPoisoned);
  std::memset(memory, 0xFF, ends);
  std::memset(memory + bytes - ends, 0xFF, ends);
}

void* poisoned_memory(size_t bytes) {
  if (bytes == 0) {
    return nullptr;
  }
  void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  TORCH_CHECK(memory != nullptr, "fakecuda: no memory for ", bytes, " bytes");
  poison(static_cast<char*>(memory), bytes);
  return memory;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = poisoned_memory(bytes);
    return {memory, memory, &std::free, current_device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceAllocator the_device_allocator;

// Page-locked memory is ordinary memory whose address ranges are kept, so that torch can ask whether a tensor is pinned.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = poisoned_memory(bytes);
    add(memory, bytes);
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  static void add(const void* memory, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex());
    ranges()[static_cast<const char*>(memory)] = bytes;
  }
  static void remove(const void* memory) {
    const std::lock_guard<std::mutex> lock(mutex());
    ranges().erase(static_cast<const char*>(memory));
  }
  static bool holds(const void* pointer) {
    const auto* address = static_cast<const char*>(pointer);
    const std::lock_guard<std::mutex> lock(mutex());
    auto next = ranges().upper_bound(address);
    if (next == ranges().begin()) {
      return false;
    }
    --next;
    return address < next->first + next->second;
  }

 private:
  static void release(void* memory) {
    remove(memory);
    std::free(memory);
  }
  // Never destroyed: tensors of the interpreter outlive the library's own objects.
  static std::mutex& mutex() {
    static auto* one = new std::mutex;
    return *one;
  }
  static std::map<const char*, size_t>& ranges() {
    static auto* one = new std::map<const char*, size_t>;
    return *one;
  }
};

PinnedAllocator the_pinned_allocator;

// What torch asks of a device. Its own streams are the default one: streams.cpp has those of this device.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = current_device();
    choose(device);
    return before;
  }
  c10::Device getDevice() const override { return current_device(); }
  void setDevice(c10::Device device) const override { choose(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { choose(device); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  bool queryStream(const c10::Stream& /*stream*/) const override { return true; }
  void synchronizeStream(const c10::Stream& /*stream*/) const override {}
  void synchronizeDevice(const c10::DeviceIndex /*device*/) const override {}
  void recordDataPtrOnStream(const c10::DataPtr& /*data*/, const c10::Stream& /*stream*/) const override {}
};

// Where torch looks for the allocator of a device.
const bool allocator_is_set = [] {
  c10::SetAllocator(c10::DeviceType::CUDA, &the_device_allocator, /*priority=*/255);
  return true;
}();

}  // namespace

c10::Allocator* device_allocator() { return &the_device_allocator; }

c10::Device current_device() { return {c10::DeviceType::CUDA, chosen}; }

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

TORCH_LIBRARY_FRAGMENT(fakecuda, m) {
  m.def("register_host(int address, int bytes) -> ()", [](int64_t address, int64_t bytes) {
    PinnedAllocator::add(reinterpret_cast<const void*>(address), static_cast<size_t>(bytes));
  });
  m.def("unregister_host(int address) -> ()", [](int64_t address) {
    PinnedAllocator::remove(reinterpret_cast<const void*>(address));
  });
}
}  // namespace fakecuda

namespace at {

// The hooks through which a torch without CUDA asks whether it has one after all. It looks for them by this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs /*unused*/) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex /*device*/) const override { return true; }
  DeviceIndex deviceCount() const override { return fakecuda::device_count(); }
  int getNumGPUs() const override { return fakecuda::device_count(); }
  DeviceIndex current_device() const override { return fakecuda::chosen; }
  DeviceIndex getCurrentDevice() const override { return fakecuda::chosen; }
  void setCurrentDevice(DeviceIndex device) const override { fakecuda::chosen = device; }
  bool isPinnedPtr(const void* pointer) const override { return fakecuda::PinnedAllocator::holds(pointer); }
  Allocator* getPinnedMemoryAllocator() const override { return &fakecuda::the_pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &fakecuda::the_device_allocator; }
  Device getDeviceFromPtr(void* /*pointer*/) const override { return fakecuda::current_device(); }
  void deviceSynchronize(DeviceIndex /*device*/) const override {}
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
