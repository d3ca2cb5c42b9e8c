"""Entry point for `ray job submit`: a whole run on the cluster that the job was submitted to.

ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/run.py --config configs/smoke.yaml
"""

from entry import start

if __name__ == "__main__":
    start("run", __doc__)
