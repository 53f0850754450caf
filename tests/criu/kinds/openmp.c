/* Four threads of OpenMP sum a series; says "tick N ok" for each sum that is right. */
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	for (long n = 0; access("stop", F_OK) != 0; n++) {
		double sum = 0;
		int threads = 0;

#pragma omp parallel for reduction(+ : sum) reduction(max : threads) num_threads(4)
		for (long k = 0; k < 400000; k++) {
			sum += 1.0 / (double) (k + 1);
			threads = omp_get_num_threads();
		}
		printf("tick %ld %s\n", n, threads == 4 && fabs(sum - 13.476435) < 1e-5 ? "ok" : "wrong");
		usleep(10000);
	}
	return 3;
}
