// What the parts of the fake CUDA device share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

namespace fakecuda {

// The allocator of "device" memory, which is host memory. Fresh memory holds NaN, at least
// in the first and last megabytes.
c10::Allocator* device_allocator();

// The device that the calling thread has chosen.
c10::Device current_device();

// Whether `tensor` is defined and lies on a fake device.
bool on_device(const at::Tensor& tensor);

// A CPU tensor over the memory of `tensor`, which lies on a fake device. It keeps that memory alive.
at::Tensor host_alias(const at::Tensor& tensor);

// The memory of `storage` as memory of `device`, kept alive by the result.
c10::Storage shared_storage(const c10::Storage& storage, c10::Device device);

// Streams. A copy that is asynchronous arrives when somebody waits for it, and not before: what is read too early is stale,
// or NaN, and a source on the host that is overwritten too early is copied as it is then.

// Queues a copy between page-locked memory and the device on the current stream. On the default stream a copy to the device
// is there at once, since the ops that follow run after it.
void copy_later(const at::Tensor& to, const at::Tensor& from, bool to_device);

// Copies what was queued on `stream` with tickets up to `ticket`. Copies to the host arrive only where the host waits.
void deliver(int64_t stream, int64_t ticket, bool host_waits);
void deliver_before_op();  // what is queued on the current stream: an op runs after it, and at once
void deliver_all_of(int64_t stream);
void deliver_everything();

int64_t current_stream();  // of the calling thread; 0 is the default one
void set_stream(int64_t stream);
int64_t last_ticket();  // of all copies so far

// Notes that the host waits for the device. Raises an error if torch.cuda.set_sync_debug_mode("error") is in force.
void note_synchronization(const std::string& cause);

}  // namespace fakecuda
