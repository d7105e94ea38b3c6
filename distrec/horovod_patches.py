"""What is changed in the sources of Horovod 0.28.1 before they are compiled, and why.

Each entry is (file, text as released, text that compiles and works, how often it stands there).
"""

from __future__ import annotations

Patch = tuple[str, str, str, int]

# torch's headers need C++20
_COMPILES: tuple[Patch, ...] = (
    ("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)", 1),
    ("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 17)", "set(CMAKE_CXX_STANDARD 20)", 1),
    ("CMakeLists.txt", '"-std=c++17"', '"-std=c++20"', 1),
    (
        "horovod/torch/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
        1,
    ),
)

# a vector is reserved where it has to be resized, so that the stall check is dead
_STALL_CHECK: tuple[Patch, ...] = (
    (
        "horovod/common/gloo/gloo_controller.cc",
        "global_ranks_.reserve(size_)",
        "global_ranks_.resize(size_)",
        1,
    ),
)

# connections ignore the network interface asked for and go by the host's name: a host whose name
# means 127.0.1.1, as is usual on Debian, could not train with another
_SET_DEVICE = """\
  device_attr.iface = gloo_iface_;
  device_attr.ai_family = AF_UNSPEC;
  auto dev = CreateDevice(device_attr);

  global_ctx"""
_INTERFACE: tuple[Patch, ...] = (
    (
        "horovod/common/gloo/gloo_context.cc",
        _SET_DEVICE,
        f"  gloo_iface_ = global_context.gloo_iface_;\n{_SET_DEVICE}",
        1,
    ),
)

# the background thread sleeps a cycle of 1 ms whatever there is to do, and all ranks talk in every
# cycle: it starts at once when a tensor comes, looks often while one is under way, else every 5 ms
_QUEUE = "horovod/common/tensor_queue"
_WAIT_FOR_TENSOR = """\
void TensorQueue::WaitForTensor(std::chrono::steady_clock::duration most) {
  std::unique_lock<std::mutex> lock(mutex_);
  std::chrono::steady_clock::duration few = std::chrono::microseconds(200);
  if (!tensor_table_.empty() && few < most) {
    most = few;
  }
  arrived_.wait_for(lock, most, [this] { return has_arrived_; });
  has_arrived_ = false;
}

// Add a TensorTableEntry as well as its message to the queue.
"""
_ARRIVES = "  has_arrived_ = true;\n  arrived_.notify_one();\n  return Status::OK();\n}\n"
_ADD_ONE = "  message_queue_.push(std::move(message));\n  return Status::OK();\n}\n"
_ADD_MANY = "    message_queue_.push(std::move(messages[i]));\n  }\n  return Status::OK();\n}\n"
_CYCLE: tuple[Patch, ...] = (
    (
        f"{_QUEUE}.h",
        "#include <mutex>\n",
        "#include <chrono>\n#include <condition_variable>\n#include <mutex>\n",
        1,
    ),
    (
        f"{_QUEUE}.h",
        "  void RemoveJoinTensor();\n",
        "  void RemoveJoinTensor();\n\n"
        "  void WaitForTensor(std::chrono::steady_clock::duration most);\n",
        1,
    ),
    (
        f"{_QUEUE}.h",
        "  mutable std::mutex mutex_;\n",
        "  mutable std::mutex mutex_;\n\n"
        "  std::condition_variable arrived_;\n  bool has_arrived_ = false;\n",
        1,
    ),
    (
        f"{_QUEUE}.cc",
        "// Add a TensorTableEntry as well as its message to the queue.\n",
        _WAIT_FOR_TENSOR,
        1,
    ),
    (f"{_QUEUE}.cc", _ADD_ONE, _ADD_ONE.replace("  return Status::OK();\n}\n", _ARRIVES), 1),
    (f"{_QUEUE}.cc", _ADD_MANY, _ADD_MANY.replace("  return Status::OK();\n}\n", _ARRIVES), 1),
    (
        "horovod/common/operations.cc",
        "    std::this_thread::sleep_for(sleep_duration);\n  }\n  state.last_cycle_start",
        "    state.process_set_table.Get(0).tensor_queue.WaitForTensor(sleep_duration);\n"
        "  }\n  state.last_cycle_start",
        1,
    ),
    (
        "horovod/common/operations.cc",
        "state.parameter_manager.SetCycleTimeMs(1);",
        "state.parameter_manager.SetCycleTimeMs(5);",
        1,
    ),
)

# ranks negotiate an alltoall anew whenever the number of its rows changes, that is, always; but
# what they agreed on does not depend on it
_CACHE = "horovod/common/response_cache.cc"
_SAME_SHAPE = """\
// The rows of an alltoall are not part of what the ranks have agreed on.
static bool SameShape(std::vector<int64_t> a, std::vector<int64_t> b, bool is_alltoall) {
  if (is_alltoall && !a.empty() && !b.empty()) {
    a[0] = b[0] = 0;
  }
  return a == b;
}

void ResponseCache::clear() {
"""
_AGREED: tuple[Patch, ...] = (
    (_CACHE, "void ResponseCache::clear() {\n", _SAME_SHAPE, 1),
    (
        _CACHE,
        "cache_params.shape == message.tensor_shape() &&",
        "SameShape(cache_params.shape, message.tensor_shape(),\n"
        "                      message.request_type() == Request::RequestType::ALLTOALL) &&",
        1,
    ),
    (
        _CACHE,
        "same_shape = (cache_params.shape == params.shape);",
        "same_shape = SameShape(cache_params.shape, params.shape,\n"
        "          response.response_type() == Response::ResponseType::ALLTOALL);",
        1,
    ),
)

# a wait spins, and takes the core from the rank that is waited for
_HANDLES = "horovod/torch/handle_manager"
_WAIT = """\
void HandleManager::WaitHandle(int handle, std::chrono::milliseconds most) {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait_for(lock, most, [&] {
    auto found = results_.find(handle);
    return found == results_.end() || found->second != nullptr;
  });
}

bool HandleManager::PollHandle(int handle) {
"""
_SPIN = """\
    if (handle_manager.PollHandle(handle)) break;
    {
      py::gil_scoped_release release_python_gil;
      std::this_thread::yield();
    }
"""
_SLEEP = """\
    if (handle_manager.PollHandle(handle)) break;
    {
      py::gil_scoped_release release_python_gil;
      handle_manager.WaitHandle(handle, std::chrono::milliseconds(100));
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
"""
_WAITING: tuple[Patch, ...] = (
    (
        f"{_HANDLES}.h",
        "#include <atomic>\n",
        "#include <atomic>\n#include <chrono>\n#include <condition_variable>\n",
        1,
    ),
    (
        f"{_HANDLES}.h",
        "  bool PollHandle(int handle);\n",
        "  bool PollHandle(int handle);\n"
        "  void WaitHandle(int handle, std::chrono::milliseconds most);\n",
        1,
    ),
    (
        f"{_HANDLES}.h",
        "  std::mutex mutex_;\n",
        "  std::mutex mutex_;\n  std::condition_variable done_;\n",
        1,
    ),
    (
        f"{_HANDLES}.cc",
        "  results_[handle] = std::make_shared<Status>(status);\n",
        "  results_[handle] = std::make_shared<Status>(status);\n  done_.notify_all();\n",
        1,
    ),
    (f"{_HANDLES}.cc", "bool HandleManager::PollHandle(int handle) {\n", _WAIT, 1),
    ("horovod/torch/mpi_ops_v2.cc", _SPIN, _SLEEP, 1),
)

PATCHES = _COMPILES + _STALL_CHECK + _INTERFACE + _CYCLE + _AGREED + _WAITING
