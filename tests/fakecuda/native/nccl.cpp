// NCCL for tensors of the fake device: gloo on aliases of their memory. The backend is registered for CUDA alone, so torch
// refuses a CPU tensor in such a group with the words that it has for a real one.
#include "fakecuda.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <vector>

namespace fakecuda {
namespace {

using at::Tensor;
using c10d::Work;
using WorkPtr = c10::intrusive_ptr<Work>;
using Tensors = std::vector<Tensor>;

Tensor hosted(const Tensor& tensor) {
  TORCH_CHECK(on_device(tensor), "fakecuda: NCCL got a tensor of ", tensor.device().str());
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "fakecuda: NCCL got a tensor that is not contiguous");
  return host_alias(tensor);
}

Tensors hosted(const Tensors& tensors) {
  Tensors aliases;
  aliases.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    aliases.push_back(hosted(tensor));
  }
  return aliases;
}

std::vector<Tensors> hosted(const std::vector<Tensors>& lists) {
  std::vector<Tensors> aliases;
  aliases.reserve(lists.size());
  for (const auto& tensors : lists) {
    aliases.push_back(hosted(tensors));
  }
  return aliases;
}

// The work of several collectives that were called as one.
class JointWork final : public Work {
 public:
  explicit JointWork(std::vector<WorkPtr> parts) : parts_(std::move(parts)) {}
  bool isCompleted() override {
    return std::all_of(parts_.begin(), parts_.end(), [](const WorkPtr& part) { return part->isCompleted(); });
  }
  bool wait(std::chrono::milliseconds timeout) override {
    return std::all_of(parts_.begin(), parts_.end(), [&](const WorkPtr& part) { return part->wait(timeout); });
  }

 private:
  std::vector<WorkPtr> parts_;
};

class HostNccl final : public c10d::Backend {
 public:
  explicit HostNccl(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "nccl"; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }

  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override { coalesced_.emplace(); }
  WorkPtr endCoalescing() override {
    auto work = c10::make_intrusive<JointWork>(std::move(*coalesced_));
    coalesced_.reset();
    return work;
  }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto aliases = hosted(tensors);
    return noted(gloo_->broadcast(aliases, options));
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto aliases = hosted(tensors);
    return noted(gloo_->allreduce(aliases, options));
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    auto aliases = hosted(tensors);
    return noted(gloo_->allreduce_coalesced(aliases, options));
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto aliases = hosted(tensors);
    return noted(gloo_->reduce(aliases, options));
  }
  WorkPtr allgather(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = hosted(outputs);
    auto from = hosted(inputs);
    return noted(gloo_->allgather(to, from, options));
  }
  WorkPtr _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    auto to = hosted(output);
    auto from = hosted(input);
    return noted(gloo_->_allgather_base(to, from, options));
  }
  WorkPtr allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = hosted(outputs);
    auto from = hosted(inputs);
    return noted(gloo_->allgather_into_tensor_coalesced(to, from, options));
  }
  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto to = hosted(outputs);
    auto from = hosted(inputs);
    return noted(gloo_->gather(to, from, options));
  }
  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
    auto to = hosted(outputs);
    auto from = hosted(inputs);
    return noted(gloo_->scatter(to, from, options));
  }
  WorkPtr reduce_scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& options) override {
    auto to = hosted(outputs);
    auto from = hosted(inputs);
    return noted(gloo_->reduce_scatter(to, from, options));
  }
  WorkPtr _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto to = hosted(output);
    auto from = hosted(input);
    return noted(gloo_->_reduce_scatter_base(to, from, options));
  }
  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    auto to = hosted(outputs);
    auto from = hosted(inputs);
    return noted(gloo_->reduce_scatter_tensor_coalesced(to, from, options));
  }
  WorkPtr alltoall_base(Tensor& output, Tensor& input, std::vector<int64_t>& output_sizes,
      std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions& options) override {
    auto to = hosted(output);
    auto from = hosted(input);
    return noted(gloo_->alltoall_base(to, from, output_sizes, input_sizes, options));
  }
  WorkPtr send(Tensors& tensors, int to, int tag) override {
    auto aliases = hosted(tensors);
    return noted(gloo_->send(aliases, to, tag));
  }
  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    auto aliases = hosted(tensors);
    return noted(gloo_->recv(aliases, from, tag));
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override { return noted(gloo_->barrier(options)); }

 private:
  WorkPtr noted(WorkPtr work) {
    if (coalesced_) {
      coalesced_->push_back(work);
    }
    return work;
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
  std::optional<std::vector<WorkPtr>> coalesced_;  // the work since startCoalescing
};

// Gives `group` NCCL, over the gloo backend of `carrier`.
void register_nccl(
    const c10::intrusive_ptr<c10d::ProcessGroup>& group, const c10::intrusive_ptr<c10d::ProcessGroup>& carrier) {
  auto nccl = c10::make_intrusive<HostNccl>(carrier->getBackend(c10d::ProcessGroup::BackendType::GLOO));
  group->setBackend(c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::NCCL, nccl);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fakecuda, m) {
  m.def(
      "register_nccl(__torch__.torch.classes.c10d.ProcessGroup group, "
      "__torch__.torch.classes.c10d.ProcessGroup carrier) -> ()",
      &register_nccl);
}

}  // namespace fakecuda
