#define DR_ISA isa_portable
#define DR_TABLE vectors_portable
#include "vectors.inc"
