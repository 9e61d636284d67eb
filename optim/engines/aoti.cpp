// Calls of what AOTInductor made that leave Python's lock to others (optim/engines/aoti.py): torch's own binding holds it
// for as long as a run takes.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

struct Model {
  std::vector<at::Tensor> constants;
  std::unique_ptr<torch::inductor::AOTIModelContainerRunnerCpu> runner;
};

struct Unlocked {
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

template <typename Result, typename Call>
Result guarded(Result failed, Call call) {
  try {
    return call();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "the model failed in a way that C++ does not know");
  }
  return failed;
}

}  // namespace

// `values` is a dictionary of tensors; the library has its own of others, or it must have none.
extern "C" void* load(const char* path, int64_t calls, PyObject* values, bool has_others) {
  return guarded<void*>(nullptr, [&]() -> void* {
    auto model = std::make_unique<Model>();
    {
      Unlocked unlocked;
      model->runner = std::make_unique<torch::inductor::AOTIModelContainerRunnerCpu>(path, calls);
    }
    // The runner makes a tensor of each that it never lets go of (seen in torch 2.8): so of what owns no memory.
    std::unordered_map<std::string, at::Tensor> views;
    for (const auto& [name, full_name] : model->runner->getConstantNamesToOriginalFQNs()) {
      PyObject* value = PyDict_GetItemString(values, full_name.c_str());
      if (value && THPVariable_Check(value)) {
        const at::Tensor& tensor = model->constants.emplace_back(THPVariable_Unpack(value));
        views.emplace(name, at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options()));
      } else if (!has_others) {
        throw std::runtime_error("its constant " + full_name + " has no value");
      }
    }
    model->runner->update_constant_buffer(
        views, /* use_inactive = */ false, /* validate_full_updates = */ false, /* user_managed = */ true);
    return model.release();
  });
}

extern "C" void unload(void* model) {
  Unlocked unlocked;
  delete static_cast<Model*>(model);
}

// A tuple of tensors -> a list of tensors.
extern "C" PyObject* run(void* model, PyObject* inputs) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    std::vector<at::Tensor> tensors;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(inputs); i++) {
      PyObject* input = PyTuple_GET_ITEM(inputs, i);
      if (!THPVariable_Check(input)) throw std::runtime_error("an input is no tensor");
      tensors.push_back(THPVariable_Unpack(input));
    }
    {
      Unlocked unlocked;
      tensors = static_cast<Model*>(model)->runner->boxed_run(std::move(tensors));
    }
    PyObject* found = PyList_New(tensors.size());
    for (size_t i = 0; found && i < tensors.size(); i++) PyList_SET_ITEM(found, i, THPVariable_Wrap(tensors[i]));
    return found;
  });
}
