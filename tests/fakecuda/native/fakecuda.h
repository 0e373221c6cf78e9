// What the parts of the fake CUDA device share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

namespace fakecuda {

// The allocator of "device" memory, which is host memory. Fresh memory holds NaN.
c10::Allocator* device_allocator();

// The device that the calling thread has chosen.
c10::Device current_device();

// Whether `tensor` is defined and lies on a fake device.
bool on_device(const at::Tensor& tensor);

// A CPU tensor over the memory of `tensor`, which lies on a fake device. It keeps that memory alive.
at::Tensor host_alias(const at::Tensor& tensor);

// The memory of `storage` as memory of `device`, kept alive by the result.
c10::Storage shared_storage(const c10::Storage& storage, c10::Device device);

// Notes that the host waits for the device. Raises an error if torch.cuda.set_sync_debug_mode("error") is in force.
void note_synchronization(const std::string& cause);

}  // namespace fakecuda
