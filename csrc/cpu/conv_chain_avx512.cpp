#define DR_ISA isa_avx512
#define DR_TABLE avx512
#include "conv_chain.inc"
