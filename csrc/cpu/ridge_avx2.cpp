#define DR_ISA isa_avx2
#define DR_TABLE ridge_avx2
#include "ridge.inc"
