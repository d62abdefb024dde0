#define DR_ISA isa_avx512
#define DR_TABLE ridge_avx512
#include "ridge.inc"
