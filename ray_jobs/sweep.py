"""Entry point for `ray job submit`: a sweep on the cluster that the job was submitted to.

ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/sweep.py --config sweeps/smoke_p_tau.yaml
"""

from entry import start

if __name__ == "__main__":
    start("sweep", __doc__)
