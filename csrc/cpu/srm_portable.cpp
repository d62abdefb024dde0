#define DR_ISA isa_portable
#define DR_TABLE srm_portable
#include "srm.inc"
