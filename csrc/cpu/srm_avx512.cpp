#define DR_ISA isa_avx512
#define DR_TABLE srm_avx512
#include "srm.inc"
