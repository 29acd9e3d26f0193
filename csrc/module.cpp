// The Python module fastnca._C: the limited C interface, so that one binary serves every Python from 3.10 on, and
// plain addresses instead of tensors, so that it serves every torch. fastnca/automaton/ops.py checks what it passes here.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdint>
#include <cstdlib>

#include "fastnca.h"

namespace {

using namespace fastnca;

// Runs the handlers of the signals that have come, and says whether one of them raised: that error is then set.
bool interrupted() {
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return raised;
}

// (batch, mel height, mel width, linear height, linear width), num_steps, save_every, life_mask, growth, bf16, threads,
// whether Python runs the handlers of signals in this thread
#define PROBLEM_FORMAT "(nnnnn)nnpppip"
#define PROBLEM_TARGETS(p)                                                                                   \
    &p.batch, &p.height[0], &p.width[0], &p.height[1], &p.width[1], &p.num_steps, &p.save_every, &p.life_mask, \
        &p.growth, &p.bf16, &p.threads, &p.handles_signals

struct ParsedProblem {
    Py_ssize_t batch, height[2], width[2], num_steps, save_every;
    int life_mask, growth, bf16, threads, handles_signals;

    Problem problem() const {
        return {batch,          {height[0], height[1]}, {width[0], width[1]}, num_steps, save_every,
                life_mask != 0, growth != 0,            bf16 != 0,            threads,
                handles_signals ? interrupted : nullptr};
    }
};

float* address(unsigned long long value) { return reinterpret_cast<float*>(static_cast<uintptr_t>(value)); }

// An argument that is a tuple of `count` addresses or, where it is optional, an empty one, which leaves them null;
// parse() is for the format "O&" of PyArg_ParseTuple.
template <int count, bool optional = false>
struct Addresses {
    float* at[count] = {};

    static int parse(PyObject* argument, void* addresses) {
        if (!PyTuple_Check(argument)) {
            PyErr_Format(PyExc_TypeError, "expected a tuple of %d addresses, not %R", count, Py_TYPE(argument));
            return false;
        }
        if (optional && PyTuple_Size(argument) == 0) return true;
        if (PyTuple_Size(argument) != count) {
            PyErr_Format(PyExc_ValueError, "expected %d addresses, got %zd", count, PyTuple_Size(argument));
            return false;
        }
        for (int i = 0; i < count; i++) {
            const unsigned long long value = PyLong_AsUnsignedLongLong(PyTuple_GetItem(argument, i));
            if (PyErr_Occurred()) return false;
            static_cast<Addresses*>(addresses)->at[i] = address(value);
        }
        return true;
    }
};

// In the order w1, b1, w2, b2, w3, b3.
using Parameters = Addresses<6>;

Weights weights_at(const Parameters& p) { return {p.at[0], p.at[1], p.at[2], p.at[3], p.at[4], p.at[5]}; }

// In the order mel rows, linear rows, columns.
using Tables = Addresses<3, true>;

Context context_at(const Tables& t) { return {{t.at[0], t.at[1]}, t.at[2]}; }

bool can_multiply(int bf16) {
    if (!bf16 || active_kernels().bf16) return true;
    PyErr_Format(PyExc_ValueError, "the kernels '%s' have no bf16 products", active_kernels().name);
    return false;
}

PyObject* finished(Outcome outcome) {
    if (outcome == Outcome::out_of_memory) return PyErr_NoMemory();
    if (outcome == Outcome::interrupted) return nullptr;  // interrupted() has set the error
    Py_RETURN_NONE;
}

PyObject* py_rollout(PyObject*, PyObject* args) {
    ParsedProblem parsed;
    Parameters weights;
    Tables context;
    Addresses<2> initial, final;
    unsigned long long states;
    if (!PyArg_ParseTuple(args, PROBLEM_FORMAT "O&O&O&O&K", PROBLEM_TARGETS(parsed), weights.parse, &weights,
                          context.parse, &context, initial.parse, &initial, final.parse, &final, &states))
        return nullptr;
    if (!can_multiply(parsed.bf16)) return nullptr;
    Outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = rollout(parsed.problem(), weights_at(weights), context_at(context), initial.at, final.at,
                      address(states));
    Py_END_ALLOW_THREADS
    return finished(outcome);
}

PyObject* py_rollout_backward(PyObject*, PyObject* args) {
    ParsedProblem parsed;
    Parameters weights, gradient_weights;
    Tables context, gradient_context;
    Addresses<2> gradient_final, gradient_initial;
    unsigned long long states;
    if (!PyArg_ParseTuple(args, PROBLEM_FORMAT "O&O&KO&O&O&O&", PROBLEM_TARGETS(parsed), weights.parse, &weights,
                          context.parse, &context, &states, gradient_final.parse, &gradient_final,
                          gradient_initial.parse, &gradient_initial, gradient_weights.parse, &gradient_weights,
                          gradient_context.parse, &gradient_context))
        return nullptr;
    if (!can_multiply(parsed.bf16)) return nullptr;
    Outcome outcome;
    Py_BEGIN_ALLOW_THREADS
    outcome = rollout_backward(parsed.problem(), weights_at(weights), context_at(context), address(states),
                               gradient_final.at, gradient_initial.at, gradient_weights.at, gradient_context.at);
    Py_END_ALLOW_THREADS
    return finished(outcome);
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
    {"rollout", py_rollout, METH_VARARGS, "problem, weights, context or (), initial grids, final grids, states or 0"},
    {"rollout_backward", py_rollout_backward, METH_VARARGS,
     "problem, weights, context or (), states, gradients of the final grids, of the initial grids, of the weights, of "
     "the context"},
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
