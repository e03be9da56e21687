/* A small libnvidia-ml.so.1 whose GPUs do what the environment of the process says.
 *
 * FAKE_NVML_GPUS          how many (2)
 * FAKE_NVML_MODE          "none": no GPU; "broken": the driver does not start; "denied": neither clocks nor power limits
 *                         may be changed; "denied1": not those of GPU 1; "nocap": power limits may not; "bare": most
 *                         functions are unsupported; "old": a driver without power fields, MIG and versioned structs;
 *                         "lost": every GPU falls off the bus as soon as it is open; "mig": split; "throttled": below
 *                         a locked clock
 * FAKE_NVML_LOST          "GPU:T_NS": that GPU falls off the bus at this time; all times are CLOCK_MONOTONIC
 * FAKE_NVML_LOG           file that every change is appended to, as `GPU MHZ` (0: unlocked) or `GPU W WATTS`; the last
 *                         line of a GPU is its state
 * FAKE_NVML_POWER         file of lines `GPU T_NS MILLIWATTS`, a GPU's times ascending, that may be appended to at any
 *                         time: the power from then on (below 0: off the bus). Before the first line a GPU draws
 *                         103 W + 50 W * its index in the mean, another step around it each tenth of a second
 * FAKE_NVML_PERIOD_MS     both power sensors update at FAKE_NVML_PHASE_MS (0) + a multiple of this (100). Instant power
 * FAKE_NVML_WINDOW_MS     is the mean over this long (25)
 * FAKE_NVML_LAG_MS        up to this long (0) before the update; average power over 1 s before the update
 * FAKE_NVML_COUNTER_MS    the energy counter updates likewise at the phase + a multiple of this (100)
 * FAKE_NVML_COUNTER_MJ    and counts whole multiples of this (1)
 * FAKE_NVML_WRAP_MJ       up to this, where it begins at 0 again (never)
 * FAKE_NVML_PROCESSES     "GPU:PID:MIB,...": processes that compute; without a third number NVML does not know it. The
 *                         driver itself names those whose PID no Linux has
 * FAKE_NVML_USED_MIB      "GPU:MIB,...": memory that is taken; without it the sum of the processes'
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, FUNCTION_NOT_FOUND = 13, GPU_IS_LOST = 15 };
enum { MOST = 16, FIRST_MHZ = 210, LAST_MHZ = 1980, STEP_MHZ = 15, MEMORY_MHZ = 2619, THROTTLED_MHZ = 150 };
enum { FIRST_W = 200, LAST_W = 700, TOTAL_MIB = 81559, RESERVED_MIB = 600, PID_MAX = 4194304 };
enum { APPLICATION_SETTING = 0x2, POWER_CAP = 0x4 };
#define MS 1000000LL
#define TENTH (100 * MS)
#define MIB (1ULL << 20)

typedef struct { int64_t t_ns; double mw, mws; } change_t; /* power from t_ns on; energy in mW s up to it */
typedef struct { unsigned index; change_t *changes; size_t count; } gpu_t, *device_t;
typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency_us;
    uint32_t type, status;
    union { double d; uint32_t u; uint64_t ull; } value;
} field_t;
typedef struct { uint64_t total, free, used; } memory_t;
typedef struct { uint32_t version; uint64_t total, reserved, free, used; } memory_v2_t;
typedef struct { uint32_t pid; uint64_t bytes; uint32_t gpu_instance, compute_instance; } process_t;

static gpu_t devices[MOST];

/* The settings. */

static const char *setting(const char *name) { const char *set = getenv(name); return set ? set : ""; }
static int mode(const char *name) { return strcmp(setting("FAKE_NVML_MODE"), name) == 0; }
static double number(const char *name, double otherwise) { return *setting(name) ? atof(setting(name)) : otherwise; }
static int64_t ns(const char *name, double ms) { return (int64_t)(number(name, ms) * MS); }
static unsigned gpus(void) { return mode("none") ? 0 : (unsigned)number("FAKE_NVML_GPUS", 2); }

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 * MS + now.tv_nsec;
}

/* Power and energy as they are, before any sensor. */

static double energy_mws(device_t d, int64_t t_ns) {
    static const double steps_w[10] = {0, 6, 1, 5, 2, 4, 3, 2, 4, 3}; /* 3 in the mean of any second */
    for (size_t i = d->count; i-- > 0;)
        if (d->changes[i].t_ns <= t_ns) return d->changes[i].mws + d->changes[i].mw * (t_ns - d->changes[i].t_ns) / 1e9;
    int64_t tenth = t_ns / TENTH;
    double swing_ws = tenth / 10 * 3.0 + steps_w[tenth % 10] * (t_ns % TENTH) / 1e9;
    for (int i = 0; i < tenth % 10; i++) swing_ws += steps_w[i] / 10;
    return (100e3 + 50e3 * d->index) * (t_ns / 1e9) + 1e3 * swing_ws;
}

static double mean_mw(device_t d, int64_t end_ns, int64_t length_ns) {
    return (energy_mws(d, end_ns) - energy_mws(d, end_ns - length_ns)) / (length_ns / 1e9);
}

static void read_changes(void) { /* what was appended to the file since the last call */
    static long read_to;
    FILE *file = fopen(setting("FAKE_NVML_POWER"), "r");
    char line[128];
    unsigned gpu;
    long long t_ns;
    double mw;
    if (file) fseek(file, read_to, SEEK_SET);
    while (file && fgets(line, sizeof line, file) && strchr(line, '\n')) { /* a line half written waits */
        read_to = ftell(file);
        if (sscanf(line, "%u %lld %lf", &gpu, &t_ns, &mw) != 3 || gpu >= MOST) abort();
        device_t d = &devices[gpu];
        d->index = gpu;
        d->changes = realloc(d->changes, (d->count + 1) * sizeof *d->changes);
        double mws = energy_mws(d, t_ns);
        d->changes[d->count++] = (change_t){t_ns, mw, mws};
    }
    if (file) fclose(file);
}

static int state(device_t d) { /* of the bus */
    unsigned gpu;
    long long t_ns;
    size_t i;
    read_changes();
    for (i = d->count; i > 0 && d->changes[i - 1].t_ns > now_ns();) i--;
    if (mode("lost") || (i > 0 && d->changes[i - 1].mw < 0)) return GPU_IS_LOST;
    int falls = sscanf(setting("FAKE_NVML_LOST"), "%u:%lld", &gpu, &t_ns) == 2 && gpu == d->index;
    return falls && now_ns() >= t_ns ? GPU_IS_LOST : SUCCESS;
}

static int sensor(device_t d) { return mode("bare") ? NOT_SUPPORTED : state(d); }

/* What was set: the log is the memory. */

static unsigned last(device_t d, const char *format, unsigned otherwise) {
    unsigned gpu, value;
    char line[64];
    FILE *log = fopen(setting("FAKE_NVML_LOG"), "r");
    while (log && fgets(line, sizeof line, log))
        if (sscanf(line, format, &gpu, &value) == 2 && gpu == d->index) otherwise = value;
    if (log) fclose(log);
    return otherwise;
}

static int change(device_t d, const char *format, unsigned value) {
    if (mode("denied") || (mode("denied1") && d->index == 1)) return NO_PERMISSION;
    if (state(d)) return state(d);
    FILE *log = fopen(setting("FAKE_NVML_LOG"), "a");
    if (!log) abort();
    fprintf(log, format, d->index, value);
    fclose(log);
    return SUCCESS;
}

/* The library. */

int nvmlInitWithFlags(unsigned flags) { return mode("broken") ? DRIVER_NOT_LOADED : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    snprintf(text, size, "999.1.fake");
    return mode("old") ? NOT_SUPPORTED : SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned *count) { *count = gpus(); return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    if (index >= gpus()) return INVALID_ARGUMENT;
    devices[index].index = index;
    *device = &devices[index];
    return mode("lost") ? SUCCESS : state(*device);
}

static int write_text(char *text, unsigned size, const char *format, unsigned number) {
    snprintf(text, size, format, number);
    return SUCCESS;
}
int nvmlDeviceGetUUID(device_t d, char *text, unsigned size) { return write_text(text, size, "GPU-fake-%u", d->index); }
int nvmlDeviceGetName(device_t d, char *text, unsigned size) {
    return write_text(text, size, mode("bare") ? "NVIDIA Nothing" : "NVIDIA H100 80GB HBM3", 0);
}
int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size) {
    return pid > PID_MAX ? write_text(name, size, "fake-%u", pid) : NOT_FOUND;
}

static int64_t update_ns(int64_t period_ns) { /* the latest */
    int64_t phase_ns = ns("FAKE_NVML_PHASE_MS", 0);
    return (now_ns() - phase_ns) / period_ns * period_ns + phase_ns;
}

static uint32_t power_mw(device_t d, int64_t lag_ns, int64_t window_ns) {
    return (uint32_t)(mean_mw(d, update_ns(ns("FAKE_NVML_PERIOD_MS", 100)) - lag_ns, window_ns) + 0.5);
}

static uint32_t average_mw(device_t d) { return power_mw(d, 0, 1000 * MS); }
int nvmlDeviceGetFieldValues(device_t d, int count, field_t *fields) {
    int status = sensor(d);
    for (int i = 0; i < count; i++) {
        fields[i].status = mode("old") ? NOT_SUPPORTED : status;
        if (fields[i].field == 186)
            fields[i].value.u = power_mw(d, ns("FAKE_NVML_LAG_MS", 0), ns("FAKE_NVML_WINDOW_MS", 25));
        else if (fields[i].field == 185) fields[i].value.u = average_mw(d);
        else fields[i].status = INVALID_ARGUMENT;
    }
    return status == GPU_IS_LOST ? GPU_IS_LOST : SUCCESS;
}
int nvmlDeviceGetPowerUsage(device_t d, unsigned *mw) { int status = sensor(d); *mw = average_mw(d); return status; }
int nvmlDeviceGetTotalEnergyConsumption(device_t d, uint64_t *mj) {
    int status = sensor(d);
    uint64_t grain = (uint64_t)number("FAKE_NVML_COUNTER_MJ", 1), wrap = (uint64_t)number("FAKE_NVML_WRAP_MJ", 0);
    /* A thousandth more, as sums of tenths in binary come out a little below whole numbers. */
    *mj = (uint64_t)(energy_mws(d, update_ns(ns("FAKE_NVML_COUNTER_MS", 100))) + 1e-3) / grain * grain;
    if (wrap) *mj %= wrap;
    return status;
}
int nvmlDeviceGetClockInfo(device_t d, unsigned type, unsigned *mhz) {
    unsigned locked = last(d, "%u %u", 0);
    *mhz = type == 2 ? MEMORY_MHZ : !locked ? LAST_MHZ : mode("throttled") ? locked - THROTTLED_MHZ : locked;
    return sensor(d);
}
int nvmlDeviceGetTemperature(device_t d, unsigned kind, unsigned *c) { *c = 40 + d->index; return sensor(d); }
int nvmlDeviceGetUtilizationRates(device_t d, unsigned *rates) { rates[0] = 55; rates[1] = 11; return sensor(d); }
int nvmlDeviceGetCurrentClocksThrottleReasons(device_t d, unsigned long long *bits) {
    *bits = mode("throttled") ? POWER_CAP : APPLICATION_SETTING;
    return sensor(d);
}

static int list(unsigned first, unsigned last, unsigned *count, unsigned *clocks) {
    unsigned have = (last - first) / STEP_MHZ + 1, room = *count;
    *count = have;
    if (!clocks || room < have) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < have; i++) clocks[i] = last - i * STEP_MHZ; /* descending, as the driver lists them */
    return SUCCESS;
}
int nvmlDeviceGetSupportedMemoryClocks(device_t d, unsigned *count, unsigned *clocks) {
    return mode("bare") ? NOT_SUPPORTED : list(MEMORY_MHZ, MEMORY_MHZ, count, clocks);
}
int nvmlDeviceGetSupportedGraphicsClocks(device_t d, unsigned memory, unsigned *count, unsigned *clocks) {
    if (memory != MEMORY_MHZ) return INVALID_ARGUMENT;
    return list(FIRST_MHZ, LAST_MHZ, count, clocks);
}
int nvmlDeviceSetGpuLockedClocks(device_t d, unsigned low, unsigned high) {
    int on_grid = low >= FIRST_MHZ && low <= LAST_MHZ && (low - FIRST_MHZ) % STEP_MHZ == 0;
    return low == high && on_grid ? change(d, "%u %u\n", low) : INVALID_ARGUMENT;
}
int nvmlDeviceResetGpuLockedClocks(device_t d) { return change(d, "%u %u\n", 0); }
int nvmlDeviceGetPowerManagementLimit(device_t d, unsigned *mw) {
    *mw = 1000 * last(d, "%u W %u", LAST_W);
    return sensor(d);
}
int nvmlDeviceGetPowerManagementDefaultLimit(device_t d, unsigned *mw) { *mw = 1000 * LAST_W; return sensor(d); }
int nvmlDeviceGetPowerManagementLimitConstraints(device_t d, unsigned *low, unsigned *high) {
    *low = 1000 * FIRST_W;
    *high = 1000 * LAST_W;
    return sensor(d);
}
int nvmlDeviceSetPowerManagementLimit(device_t d, unsigned mw) {
    if (mode("bare")) return NOT_SUPPORTED;
    if (mode("nocap")) return NO_PERMISSION;
    return mw >= 1000 * FIRST_W && mw <= 1000 * LAST_W ? change(d, "%u W %u\n", mw / 1000) : INVALID_ARGUMENT;
}
int nvmlDeviceGetMigMode(device_t d, unsigned *current, unsigned *pending) {
    *current = *pending = mode("mig");
    return mode("old") ? FUNCTION_NOT_FOUND : sensor(d);
}

static int processes(device_t d, unsigned *count, process_t *found) {
    unsigned gpu, room = *count;
    long pid, mib;
    *count = 0;
    for (const char *at = setting("FAKE_NVML_PROCESSES"); *at; at += strcspn(at, ","), at += *at == ',') {
        int numbers = sscanf(at, "%u:%ld:%ld", &gpu, &pid, &mib);
        if (numbers < 2) abort();
        uint64_t bytes = numbers == 3 ? mib * MIB : UINT64_MAX;
        if (gpu == d->index && (*count)++ < room)
            found[*count - 1] = (process_t){(uint32_t)pid, bytes, UINT32_MAX, UINT32_MAX};
    }
    return *count > room ? INSUFFICIENT_SIZE : sensor(d);
}
int nvmlDeviceGetComputeRunningProcesses_v2(device_t d, unsigned *count, process_t *found) {
    return processes(d, count, found);
}
int nvmlDeviceGetComputeRunningProcesses_v3(device_t d, unsigned *count, process_t *found) {
    return mode("old") ? FUNCTION_NOT_FOUND : processes(d, count, found);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(device_t d, unsigned *count, process_t *found) {
    *count = 0;
    return mode("old") ? FUNCTION_NOT_FOUND : sensor(d);
}

static uint64_t used_mib(device_t d) {
    unsigned gpu, count = 64;
    unsigned long mib;
    process_t found[64];
    uint64_t sum = 0;
    for (const char *at = setting("FAKE_NVML_USED_MIB"); *at; at += strcspn(at, ","), at += *at == ',')
        if (sscanf(at, "%u:%lu", &gpu, &mib) == 2 && gpu == d->index) return mib;
    processes(d, &count, found);
    for (unsigned i = 0; i < count; i++) sum += found[i].bytes == UINT64_MAX ? 0 : found[i].bytes / MIB;
    return sum;
}
int nvmlDeviceGetMemoryInfo_v2(device_t d, memory_v2_t *memory) {
    if (mode("old")) return FUNCTION_NOT_FOUND;
    if (memory->version != (sizeof *memory | 2 << 24)) return INVALID_ARGUMENT;
    memory->total = TOTAL_MIB * MIB;
    memory->reserved = RESERVED_MIB * MIB;
    memory->used = used_mib(d) * MIB;
    memory->free = memory->total - memory->reserved - memory->used;
    return sensor(d);
}
int nvmlDeviceGetMemoryInfo(device_t d, memory_t *memory) { /* counts what is reserved as used */
    memory->total = TOTAL_MIB * MIB;
    memory->used = (RESERVED_MIB + used_mib(d)) * MIB;
    memory->free = memory->total - memory->used;
    return sensor(d);
}

const char *nvmlErrorString(int code) {
    return code == DRIVER_NOT_LOADED ? "Driver Not Loaded" : code == NO_PERMISSION ? "Insufficient Permissions"
         : code == GPU_IS_LOST ? "GPU is lost" : "Fake Error";
}
