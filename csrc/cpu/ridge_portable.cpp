#define DR_ISA isa_portable
#define DR_TABLE ridge_portable
#include "ridge.inc"
