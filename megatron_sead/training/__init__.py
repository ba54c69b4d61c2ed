"""A training run. One step, file by file, in the order of its data:

=========================================  ===========================================================================
training/loop.py                           the order of a step, in one function
distillation/curriculum.py                 which prompts are asked
training/run.py                            prompts to requests, grades to alpha, rollouts to micro-batches
rollouts/engine.py                         the protocol of what writes the responses; transformers_engine.py is one
grading/grader.py                          which responses are right
distillation/annealing.py                  alpha, by the step or by the pass rate
prompts/packing.py                         micro-batches: tokens for each model, and which positions predict responses
training/step.py                           one optimizer step, from here to the update
training/teacher.py, training/pipeline.py  the teacher's final hidden states at the response positions
training/scoring.py                        both heads: statistics of tokens (distillation/linear_scores.py), and loss
training/supervision.py                    which tokens teach: distillation/zones.py, then distillation/policies.py
distillation/linear_divergence.py          the loss of these tokens, and its gradient
training/measure.py                        the step's metrics
training/engines.py                        the new weights in the engine, and the proof that it has them
training/record.py                         what the step leaves on disk; token_record.py: of some of its tokens
=========================================  ===========================================================================

training/setup.py comes before the first step, and training/conclude.py after the last one.
"""
