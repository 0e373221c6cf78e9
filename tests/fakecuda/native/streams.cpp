// Streams: the order in which asynchronous copies arrive. Everything else has happened when a call returns.
#include "fakecuda.h"

#include <ATen/ops/clone.h>

#include <limits>
#include <list>
#include <mutex>
#include <utility>

namespace fakecuda {
namespace {

constexpr int64_t kDefaultStream = 0;
constexpr int64_t kEvery = std::numeric_limits<int64_t>::max();

struct Copy {
  int64_t stream, ticket;
  bool to_device;
  at::Tensor to, from;
};

thread_local int64_t chosen_stream = kDefaultStream;

std::mutex mutex;
int64_t tickets = 0;

std::list<Copy>& queue() {
  static auto* one = new std::list<Copy>;  // never destroyed: it may hold tensors at the end of the process
  return *one;
}

template <typename Condition>
void deliver_if(Condition due) {
  std::list<Copy> arriving;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto each = queue().begin(); each != queue().end();) {
      const auto next = std::next(each);
      if (due(*each)) {
        arriving.splice(arriving.end(), queue(), each);
      }
      each = next;
    }
  }
  for (auto& copy : arriving) {
    copy.to.copy_(copy.from);
  }
}

// Whether two tensors on the host share memory, by the addresses of their storages' parts that they reach.
bool overlap(const at::Tensor& one, const at::Tensor& other) {
  const auto range = [](const at::Tensor& tensor) {
    const auto* first = static_cast<const char*>(tensor.const_data_ptr());
    int64_t reach = tensor.numel() > 0 ? 1 : 0;
    for (int64_t i = 0; i < tensor.dim() && reach > 0; i++) {
      reach += (tensor.size(i) - 1) * tensor.stride(i);
    }
    return std::pair(first, first + reach * tensor.element_size());
  };
  const auto [first, end] = range(one);
  const auto [other_first, other_end] = range(other);
  return first < other_end && other_first < end;
}

// A copy from the host reads what earlier copies of its stream have written there, as the device does both in that order.
void deliver_what_is_read(const at::Tensor& from) {
  deliver_if([&](const Copy& copy) {
    return copy.stream == chosen_stream && !copy.to_device && overlap(copy.to, from);
  });
}

}  // namespace

void copy_later(const at::Tensor& to, const at::Tensor& from, bool to_device) {
  if (to_device) {
    deliver_what_is_read(from);
  }
  if (to_device && chosen_stream == kDefaultStream) {
    at::Tensor(to).copy_(from);
    return;
  }
  // The device reads its own memory in the order of the stream, so later ops do not change what is copied.
  const at::Tensor source = to_device ? from : from.clone();
  const std::lock_guard<std::mutex> lock(mutex);
  queue().push_back({chosen_stream, ++tickets, to_device, to, source});
}

void deliver(int64_t stream, int64_t ticket, bool host_waits) {
  deliver_if([&](const Copy& copy) {
    return copy.stream == stream && copy.ticket <= ticket && (host_waits || copy.to_device);
  });
}

void deliver_before_op() {
  if (chosen_stream != kDefaultStream) {
    deliver(chosen_stream, kEvery, /*host_waits=*/false);
  }
}

void deliver_all_of(int64_t stream) { deliver(stream, kEvery, /*host_waits=*/true); }

void deliver_everything() {
  deliver_if([](const Copy& /*copy*/) { return true; });
}

int64_t current_stream() { return chosen_stream; }

void set_stream(int64_t stream) { chosen_stream = stream; }

int64_t last_ticket() {
  const std::lock_guard<std::mutex> lock(mutex);
  return tickets;
}

}  // namespace fakecuda
