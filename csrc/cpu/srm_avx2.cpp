#define DR_ISA isa_avx2
#define DR_TABLE srm_avx2
#include "srm.inc"
