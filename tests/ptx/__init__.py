"""A functional interpreter of the PTX that Triton emits, for tests: what a GPU would run, run on the CPU.

parser: text to instructions; memory: checked address spaces; alu: what each opcode computes; machine: threads, control
flow and barriers; device: a stand-in for the launcher. Opcodes are a whitelist: an unknown one raises `PtxError`, it
is never skipped. Not modelled: timing, races between threads (a batch of blocks advances in one fixed order), and the
translation of PTX to machine code. `fma.rn.f64` may differ from hardware in the last bit; `div.full.f32` is exact here.
"""
