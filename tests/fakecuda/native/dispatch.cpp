// The kernels: every op of torch without a CUDA kernel runs its CPU kernel on aliases of the same memory, once it is certain
// that a real device would have taken its arguments. Autograd, autocast and whatever else stands above the kernels see
// CUDA tensors.
#include "fakecuda.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <unordered_set>
#include <vector>

namespace fakecuda {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().is_cuda(); }

c10::Storage shared_storage(const c10::Storage& storage, Device device) {
  auto* owner = new c10::Storage(storage);
  c10::DataPtr data(
      storage.mutable_data(), owner, [](void* held) { delete static_cast<c10::Storage*>(held); }, device);
  auto* allocator = device.is_cuda() ? device_allocator() : c10::GetCPUAllocator();
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, /*resizable=*/true));
}

namespace {

Tensor tensor_over(c10::Storage storage, DispatchKey key, const Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

}  // namespace

Tensor host_alias(const Tensor& tensor) {
  return tensor_over(shared_storage(tensor.storage(), Device(DeviceType::CPU)), DispatchKey::CPU, tensor);
}

namespace {

// ---- what makes the host wait ----------------------------------------------------------------------------------------

enum class SyncDebugMode : int64_t { kOff = 0, kWarn = 1, kError = 2 };  // numbered as in torch.cuda

std::atomic<int64_t> synchronizations{0};
std::atomic<SyncDebugMode> sync_debug_mode{SyncDebugMode::kOff};

// Ops whose result, or the size of it, the host must know.
const std::unordered_set<std::string> kWaiting = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2",
    "aten::equal",               "aten::is_nonzero"};

}  // namespace

void note_synchronization(const std::string& cause) {
  ++synchronizations;
  deliver_all_of(current_stream());
  TORCH_CHECK(sync_debug_mode != SyncDebugMode::kError, "fakecuda: called a synchronizing CUDA operation: ", cause);
  if (sync_debug_mode == SyncDebugMode::kWarn) {
    TORCH_WARN("called a synchronizing CUDA operation: ", cause);
  }
}

namespace {

// ---- one call of the fallback ----------------------------------------------------------------------------------------

// Whether a real CUDA kernel takes this argument from the CPU. Index tensors may lie there, and so may a list that is
// copied from. Everywhere else only a tensor without dimensions may, as a number.
bool may_lie_on_host(const c10::FunctionSchema& schema, const c10::Argument& argument) {
  const auto& name = schema.name();
  const bool indexes = name.find("::index") != std::string::npos || name.find("index_put") != std::string::npos ||
      name.find("::_unsafe_index") != std::string::npos;
  return (indexes && argument.name() == "indices") || name == "aten::_foreach_copy_";
}

std::string described(const Tensor& tensor) {
  return " " + tensor.toString() + c10::str(tensor.sizes()) + " on " + tensor.device().str();
}

// The arguments of one call, with the tensors of the device replaced by aliases on the host, and the way back.
class Call {
 public:
  Call(const c10::FunctionSchema& schema, torch::jit::Stack* stack) : schema_(schema), stack_(stack) {}

  void replace_arguments() {
    const auto count = schema_.arguments().size();
    const auto first = stack_->size() - count;
    for (size_t index = 0; index < count; ++index) {
      replace((*stack_)[first + index], schema_.arguments()[index]);
    }
    TORCH_CHECK(strays_.empty() || pairs_.empty(), "fakecuda: Expected all tensors to be on the same device: ",
        schema_.operator_name(), " got tensors of ", device().str(), " and", strays_);
    if (!pairs_.empty() && kWaiting.count(schema_.name())) {
      note_synchronization(schema_.name());
    }
  }

  // In-place ops and `out=` may have given an alias another size or other memory.
  void adopt_changes() const {
    for (const auto& [original, alias] : pairs_) {
      auto* impl = original.unsafeGetTensorImpl();
      if (alias.storage().data() != original.storage().data()) {
        impl->set_storage_keep_dtype(shared_storage(alias.storage(), original.device()));
      }
      if (alias.sizes() != original.sizes() || alias.strides() != original.strides() ||
          alias.storage_offset() != original.storage_offset()) {
        impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
      }
    }
  }

  void replace_results() const {
    const auto count = schema_.returns().size();
    for (size_t index = stack_->size() - count; index < stack_->size(); ++index) {
      auto& value = (*stack_)[index];
      if (value.isTensor()) {
        value = back(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<Tensor> results;
        for (const Tensor& tensor : value.toTensorList()) {
          results.push_back(back(tensor));
        }
        value = IValue(std::move(results));
      }
    }
  }

 private:
  struct Pair {
    Tensor original, alias;
  };

  void replace(IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) {
      value = alias_of(value.toTensor(), argument, /*number_allowed=*/true);
    } else if (value.isTensorList()) {
      c10::List<Tensor> aliases;
      for (const Tensor& tensor : value.toTensorList()) {
        aliases.push_back(alias_of(tensor, argument, /*number_allowed=*/false));
      }
      value = IValue(std::move(aliases));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> aliases;
      for (std::optional<Tensor> tensor : value.toOptionalTensorList()) {
        aliases.push_back(tensor ? std::optional<Tensor>(alias_of(*tensor, argument, false)) : std::nullopt);
      }
      value = IValue(std::move(aliases));
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      named_device_ = value.toDevice().has_index() ? value.toDevice() : current_device();
      value = IValue(Device(DeviceType::CPU));
    }
  }

  Tensor alias_of(const Tensor& tensor, const c10::Argument& argument, bool number_allowed) {
    if (!tensor.defined()) {
      return tensor;
    }
    if (!on_device(tensor)) {
      const bool number = number_allowed && tensor.dim() == 0;
      if (!number && !may_lie_on_host(schema_, argument)) {
        strays_ += described(tensor);
      }
      return tensor;
    }
    if (!pairs_.empty() && tensor.device() != device()) {
      strays_ += described(tensor);
    }
    for (const auto& pair : pairs_) {
      if (pair.original.is_same(tensor)) {
        return pair.alias;
      }
    }
    pairs_.push_back({tensor, host_alias(tensor)});
    return pairs_.back().alias;
  }

  // The CUDA tensor that a result on the host stands for.
  Tensor back(const Tensor& result) const {
    if (!result.defined() || !result.device().is_cpu()) {
      return result;
    }
    for (const auto& [original, alias] : pairs_) {
      if (result.is_same(alias)) {
        return original;
      }
      const bool view = result.has_storage() && result.storage().data() == alias.storage().data();
      if (view && result.storage().data() != nullptr) {
        return tensor_over(original.storage(), DispatchKey::CUDA, result);
      }
    }
    return tensor_over(shared_storage(result.storage(), device()), DispatchKey::CUDA, result);
  }

  Device device() const {
    if (named_device_) {
      return *named_device_;
    }
    return pairs_.empty() ? current_device() : pairs_.front().original.device();
  }

  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  std::vector<Pair> pairs_;
  std::string strays_;
  std::optional<Device> named_device_;
};

void run_on_host(const c10::OperatorHandle& op, DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
  deliver_before_op();
  Call call(op.schema(), stack);
  call.replace_arguments();
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  call.adopt_changes();
  call.replace_results();
}

// ---- ops with a kernel of their own: they make device memory, or see both devices ------------------------------------

Device device_or_current(std::optional<Device> device) {
  return device && device->has_index() ? *device : current_device();
}

// Chooses a device for as long as it lives.
class Chosen {
 public:
  explicit Chosen(Device device) : guard_(device) {}

 private:
  c10::DeviceGuard guard_;
};

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
    std::optional<Device> device, std::optional<bool> /*pin_memory*/, std::optional<at::MemoryFormat> format) {
  const Chosen chosen(device_or_current(device));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), device_allocator(), DispatchKeySet(DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> /*layout*/, std::optional<Device> device, std::optional<bool> /*pin_memory*/) {
  const Chosen chosen(device_or_current(device));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      device_allocator(), DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

// A copy crosses devices. Between page-locked memory and the device it may be asynchronous. All others make the host wait.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  deliver_before_op();
  const bool to_device = on_device(self);
  const bool crosses = to_device != on_device(source);
  Tensor to = to_device ? host_alias(self) : self;
  Tensor from = on_device(source) ? host_alias(source) : source;
  if (crosses && non_blocking && (to_device ? source : self).is_pinned()) {
    copy_later(to, from, to_device);
    return self;
  }
  if (crosses) {
    note_synchronization(to_device ? "a copy to the device" : "a copy to the host");
  }
  to.copy_(from);
  return self;
}

Tensor& set_storage(
    Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "fakecuda: set_ got a storage of ", source.device().str(),
      " for a tensor of ", self.device().str());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(
        C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  } else {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  }
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const c10::SymInt count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, source, 0, {count}, {});
}

void record_stream(Tensor& /*self*/, c10::Stream /*stream*/) {}

// ---- what the Python part calls --------------------------------------------------------------------------------------

void wait_on_device(int64_t stream, int64_t ticket) { deliver(stream, ticket, /*host_waits=*/false); }
void wait_on_host(int64_t stream, int64_t ticket) {
  note_synchronization("the host waits for a stream");
  deliver(stream, ticket, /*host_waits=*/true);
}
int64_t count_synchronizations() { return synchronizations; }
void set_sync_debug_mode(int64_t mode) { sync_debug_mode = static_cast<SyncDebugMode>(mode); }
int64_t get_sync_debug_mode() { return static_cast<int64_t>(sync_debug_mode.load()); }

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

// Some ops have a CPU kernel and also a decomposition, which torch would prefer to the fallback. A real device has kernels
// for them, as the CPU has, which round differently from the decomposition.
std::vector<std::string> ops_with_kernel_and_decomposition() {
  std::vector<std::string> names;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    const bool decomposes = op && (op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) ||
        op->hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd));
    if (decomposes && name.getNamespace() == "aten" && op->hasKernelForDispatchKey(DispatchKey::CPU)) {
      names.push_back(c10::toString(name));
    }
  }
  return names;
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  for (const auto& name : ops_with_kernel_and_decomposition()) {
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("record_stream", record_stream);
}

TORCH_LIBRARY_FRAGMENT(fakecuda, m) {
  m.def("synchronizations() -> int", &count_synchronizations);
  m.def("set_stream(int stream) -> ()", &set_stream);
  m.def("last_ticket() -> int", &last_ticket);
  m.def("wait_on_device(int stream, int ticket) -> ()", &wait_on_device);
  m.def("wait_on_host(int stream, int ticket) -> ()", &wait_on_host);
  m.def("synchronize() -> ()", &deliver_everything);
  m.def("set_sync_debug_mode(int mode) -> ()", &set_sync_debug_mode);
  m.def("get_sync_debug_mode() -> int", &get_sync_debug_mode);
}

}  // namespace fakecuda
