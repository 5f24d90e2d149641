// Every operation's schema. Kernels are registered beside their code, in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(memdense, m) {
  m.def("channel_statistics(Tensor x) -> (Tensor mean, Tensor var)");
}
