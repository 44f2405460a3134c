// Parallel regions of OpenMP by std::thread, for LD_PRELOAD: ThreadSanitizer sees these begin and end, and so
// what the threads of one loop share. It does not see how libgomp's wait for each other.

#include <atomic>
#include <barrier>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  int size;
  std::barrier<>* barrier;
};

std::atomic<int> wanted{[] {
  const char* given = std::getenv("OMP_NUM_THREADS");
  return given != nullptr ? std::atoi(given) : 2;
}()};
thread_local Team team{1, nullptr};
thread_local int number = 0;
std::recursive_mutex critical;

}  // namespace

extern "C" {

void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned) {
  const int size = team.size > 1 ? 1 : threads > 0 ? static_cast<int>(threads) : wanted.load();
  std::barrier<> barrier(size);
  const Team ours{size, &barrier}, before = team;
  const int number_before = number;
  const auto run = [=](int own) {
    team = ours;
    number = own;
    region(data);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < size; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
  team = before;
  number = number_before;
}

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team.size; }
int omp_in_parallel() { return team.size > 1; }
int omp_get_max_threads() { return wanted; }
void omp_set_num_threads(int threads) { wanted = threads; }

void GOMP_barrier() {
  if (team.barrier != nullptr) team.barrier->arrive_and_wait();
}
void GOMP_critical_start() { critical.lock(); }
void GOMP_critical_end() { critical.unlock(); }
void GOMP_critical_name_start(void**) { critical.lock(); }
void GOMP_critical_name_end(void**) { critical.unlock(); }

// What has to be found: every thread of a region writes to one number.
int race_on_purpose() {
  int shared = 0;
  GOMP_parallel([](void* data) { ++*static_cast<int*>(data); }, &shared, 4, 0);
  return shared;
}

}  // extern "C"
