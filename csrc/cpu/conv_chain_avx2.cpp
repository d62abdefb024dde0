#define DR_ISA isa_avx2
#define DR_TABLE avx2
#include "conv_chain.inc"
