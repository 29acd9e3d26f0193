// The Python module fastnca._C: the limited C interface, so that one binary serves every Python from 3.10 on, and
// plain addresses instead of tensors, so that it serves every torch. fastnca/_cpu.py checks what it passes here.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdlib>

#include "fastnca.h"

namespace {

using namespace fastnca;

// (batch, mel height, mel width, linear height, linear width), num_steps, save_every, life_mask, bf16, threads
#define PROBLEM_FORMAT "(nnnnn)nnppi"
#define PROBLEM_TARGETS(p)                                                                                   \
    &p.batch, &p.height[0], &p.width[0], &p.height[1], &p.width[1], &p.num_steps, &p.save_every, &p.life_mask, \
        &p.bf16, &p.threads

struct ParsedProblem {
    Py_ssize_t batch, height[2], width[2], num_steps, save_every;
    int life_mask, bf16, threads;

    Problem problem() const {
        return {batch,     {height[0], height[1]}, {width[0], width[1]}, num_steps,
                save_every, life_mask != 0,         bf16 != 0,            threads};
    }
};

template <class T>
T* address(unsigned long long value) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(value));
}

Weights weights_at(const unsigned long long (&a)[6]) {
    return {address<const float>(a[0]), address<const float>(a[1]), address<const float>(a[2]),
            address<const float>(a[3]), address<const float>(a[4]), address<const float>(a[5])};
}

bool can_multiply(int bf16) {
    if (!bf16 || active_kernels().bf16) return true;
    PyErr_Format(PyExc_ValueError, "the kernels '%s' have no bf16 products", active_kernels().name);
    return false;
}

PyObject* finished(bool success) {
    if (!success) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject* py_rollout(PyObject*, PyObject* args) {
    ParsedProblem parsed;
    unsigned long long w[6], initial[2], final[2], states;
    if (!PyArg_ParseTuple(args, PROBLEM_FORMAT "(KKKKKK)(KK)(KK)K", PROBLEM_TARGETS(parsed), &w[0], &w[1], &w[2],
                          &w[3], &w[4], &w[5], &initial[0], &initial[1], &final[0], &final[1], &states))
        return nullptr;
    if (!can_multiply(parsed.bf16)) return nullptr;
    const float* const inputs[2] = {address<const float>(initial[0]), address<const float>(initial[1])};
    float* const outputs[2] = {address<float>(final[0]), address<float>(final[1])};
    bool success;
    Py_BEGIN_ALLOW_THREADS
    success = rollout(parsed.problem(), weights_at(w), inputs, outputs, address<float>(states));
    Py_END_ALLOW_THREADS
    return finished(success);
}

PyObject* py_rollout_backward(PyObject*, PyObject* args) {
    ParsedProblem parsed;
    unsigned long long w[6], states, gradient_final[2], gradient_initial[2], gw[6];
    if (!PyArg_ParseTuple(args, PROBLEM_FORMAT "(KKKKKK)K(KK)(KK)(KKKKKK)", PROBLEM_TARGETS(parsed), &w[0], &w[1],
                          &w[2], &w[3], &w[4], &w[5], &states, &gradient_final[0], &gradient_final[1],
                          &gradient_initial[0], &gradient_initial[1], &gw[0], &gw[1], &gw[2], &gw[3], &gw[4],
                          &gw[5]))
        return nullptr;
    if (!can_multiply(parsed.bf16)) return nullptr;
    const float* const inputs[2] = {address<const float>(gradient_final[0]), address<const float>(gradient_final[1])};
    float* const outputs[2] = {address<float>(gradient_initial[0]), address<float>(gradient_initial[1])};
    float* const weight_outputs[6] = {address<float>(gw[0]), address<float>(gw[1]), address<float>(gw[2]),
                                      address<float>(gw[3]), address<float>(gw[4]), address<float>(gw[5])};
    bool success;
    Py_BEGIN_ALLOW_THREADS
    success = rollout_backward(parsed.problem(), weights_at(w), address<const float>(states), inputs, outputs,
                               weight_outputs);
    Py_END_ALLOW_THREADS
    return finished(success);
}

PyObject* has_bf16(PyObject*, PyObject*) { return PyBool_FromLong(active_kernels().bf16 != nullptr); }

PyObject* capability(PyObject*, PyObject*) { return PyUnicode_FromString(active_kernels().name); }

PyObject* capabilities(PyObject*, PyObject*) {
    PyObject* list = PyList_New(0);
    for (const char* const* name = kernel_names(); list && *name; name++) {
        if (!find_kernels(*name)) continue;
        PyObject* item = PyUnicode_FromString(*name);
        const bool failed = !item || PyList_Append(list, item) < 0;
        Py_XDECREF(item);
        if (failed) {
            Py_DECREF(list);
            list = nullptr;
        }
    }
    return list;
}

bool activate(const char* name) {
    if (const Kernels* kernels = find_kernels(name)) {
        activate_kernels(*kernels);
        return true;
    }
    return false;
}

PyObject* set_capability(PyObject*, PyObject* args) {
    const char* name;
    if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
    if (!activate(name)) {
        PyErr_Format(PyExc_ValueError, "no kernels named '%s' that this processor can run", name);
        return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* py_peak_flops(PyObject*, PyObject* args) {
    int threads, bf16 = 0;
    if (!PyArg_ParseTuple(args, "i|p", &threads, &bf16) || !can_multiply(bf16)) return nullptr;
    double flops;
    Py_BEGIN_ALLOW_THREADS
    flops = peak_flops(threads, bf16 != 0);
    Py_END_ALLOW_THREADS
    return PyFloat_FromDouble(flops);
}

PyMethodDef methods[] = {
    {"rollout", py_rollout, METH_VARARGS, "problem, weights, initial grids, final grids, states or 0"},
    {"rollout_backward", py_rollout_backward, METH_VARARGS,
     "problem, weights, states, gradients of the final grids, of the initial grids, of the weights"},
    {"capability", capability, METH_NOARGS, "name of the instruction set in use"},
    {"capabilities", capabilities, METH_NOARGS, "names of the instruction sets that this processor can run, best last"},
    {"set_capability", set_capability, METH_VARARGS, "use the named instruction set; '' for the best"},
    {"has_bf16", has_bf16, METH_NOARGS, "whether the instruction set in use has bf16 products"},
    {"peak_flops", py_peak_flops, METH_VARARGS, "measured multiply-add peak of n threads (bf16=False), in FLOP/s"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Fused kernels of the automaton.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
    const char* wanted = std::getenv("FASTNCA_CPU_CAPABILITY");
    if (!activate(wanted ? wanted : "")) {
        PyErr_Format(PyExc_ImportError, "FASTNCA_CPU_CAPABILITY=%s: no such kernels that this processor can run",
                     wanted);
        return nullptr;
    }
    return PyModule_Create(&definition);
}
